"""Time and host memory of loading a sharded Hugging Face folder onto a device, ours and transformers'.

    tools/bench_loading.py [--folder FOLDER] [--layers N] [--output FILE.json]

Writes a random checkpoint of Llama 3.1 8B's shape (16 GB in bfloat16, shards of 5 GB) into FOLDER where
there is none, then loads it in a process of its own for each case. Host memory is sampled while loading:
`anonymous` is what the process allocated, `file` the pages of the memory-mapped shards, which the system can
take back.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

CASES = ("qrecipes", "transformers")
SHARD_BYTES = 5_000_000_000
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def main() -> int:
    """Run every case and print the table last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="default: a temporary one")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(args.case, args.folder)))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary) / "model"
        if not (folder / "config.json").is_file():
            write_random(folder, args.layers)
        results = [run_case(case, folder) for case in CASES]
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        shards = len(list(folder.glob("*.safetensors")))
    found = {
        "command": f"tools/bench_loading.py --layers {args.layers}",
        "model": LLAMA_8B | {"num_hidden_layers": args.layers},
        "bytes": size,
        "shards": shards,
        "results": results,
    }
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{size / 1e9:.2f} GB in {shards} shards")
    print(f"{'case':16}{'s':>8}{'anonymous GB':>14}{'file GB':>10}{'device GB':>11}")
    for r in results:
        if "failed" in r:
            print(f"{r['case']:16}  failed: {r['failed']}")
            continue
        print(
            f"{r['case']:16}{r['seconds']:8.1f}{r['anonymous_gb']:14.2f}{r['file_gb']:10.2f}"
            f"{r['device_gb']:11.2f}"
        )
    return int(any("failed" in r for r in results))


def run_case(case: str, folder: Path) -> dict[str, Any]:
    """One case in a process of its own."""
    command = [sys.executable, __file__, "--folder", str(folder), "--case", case]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    last = (done.stderr if done.returncode else done.stdout).strip().splitlines()[-1]
    return {"case": case} | ({"failed": last} if done.returncode else json.loads(last))


def measure(case: str, folder: Path) -> dict[str, Any]:
    """Load the folder onto the device once, and say what that took."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.zeros(1, device=device)
    if case == "qrecipes":
        from qrecipes.export.opened import open_model

        def load() -> Any:
            return open_model(f"hf:{folder}", device=device, dtype="bfloat16").model

    else:
        import transformers

        def load() -> Any:
            return transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.bfloat16, device_map={"": device}
            )

    with sampled_memory() as most:
        start = time.perf_counter()
        model = load()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    assert all(p.device.type == device for p in model.parameters())
    versions = {"torch": str(torch.__version__)}
    if case == "transformers":
        versions["transformers"] = transformers.__version__
    return {
        "seconds": round(seconds, 2),
        "anonymous_gb": round(most["RssAnon"] / 1e9, 3),
        "file_gb": round(most["RssFile"] / 1e9, 3),
        "device_gb": round(torch.cuda.max_memory_allocated() / 1e9, 3) if device == "cuda" else 0.0,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": versions,
    }


@contextmanager
def sampled_memory() -> Iterator[dict[str, int]]:
    """The largest anonymous and file-backed resident memory above those at the start, in bytes, sampled."""
    before = resident()
    most = dict.fromkeys(before, 0)
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            for key, value in resident().items():
                most[key] = max(most[key], value - before[key])

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def resident() -> dict[str, int]:
    """Resident memory of this process by kind, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    pairs = (line.split(":") for line in lines if line.startswith(("RssAnon", "RssFile")))
    return {key: int(value.split()[0]) * 1024 for key, value in pairs}


def write_random(folder: Path, layers: int) -> None:
    """A random checkpoint as transformers would have written it, with a small tokenizer."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models

    config = LLAMA_8B | {"num_hidden_layers": layers}
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    held = 0
    for name, shape in shapes(config).items():
        size = 2 * torch.Size(shape).numel()
        if held + size > SHARD_BYTES:
            shards.append({})
            held = 0
        shards[-1][name] = shape
        held += size
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {
            name: (torch.randn(shape, device=device) * 0.02).bfloat16().cpu() for name, shape in shard.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[])).save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(config))


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama by their names at Hugging Face."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    kv = width // config["num_attention_heads"] * config["num_key_value_heads"]
    layer = {
        "input_layernorm": (width,),
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (kv, width),
        "self_attn.v_proj": (kv, width),
        "self_attn.o_proj": (width, width),
        "post_attention_layernorm": (width,),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    named = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    for number in range(config["num_hidden_layers"]):
        named |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
    return named | {"model.norm.weight": (width,), "lm_head.weight": (config["vocab_size"], width)}


if __name__ == "__main__":
    sys.exit(main())
