"""The choice of tiles for TMA: fixed rule, measured choices on disk, what the compiler makes of them."""

from __future__ import annotations

import json

import pytest
import torch
from compiling import SHARED_BYTES, compiled, needs_triton
from hypothesis import given, settings
from hypothesis import strategies as st

from qrecipes.quant import int8_matmul, int8_tune
from qrecipes.quant.device import DeviceLimits
from qrecipes.quant.int8_tiles import (
    TILES,
    TMA_TILES,
    Tiles,
    choose_tma_tiles,
    fits_tma,
    tma_cost,
    tma_shared_bytes,
)
from qrecipes.quant.int8_tune import TunedTiles, bucket

H100, RTX5090 = (232_448, 132), (101_376, 170)
WIDE, TALL = Tiles(128, 256, 128, 4, 8), Tiles(256, 128, 128, 4, 8)
PERSISTENT = Tiles(128, 256, 128, 4, 8, per_processor=1)
PAIR = Tiles(128, 128, 128, 3, 4, per_processor=2)


@pytest.mark.parametrize("device", [H100, RTX5090])
@settings(max_examples=100, deadline=None)
@given(
    M=st.integers(1, 40_000),
    N=st.integers(1, 40_000),
    K=st.integers(1, 40_000),
    output_bytes=st.sampled_from([2, 4]),
)
def test_chosen_tiles_fit_the_device_and_are_the_cheapest(device, M, N, K, output_bytes):
    shared_bytes, processors = device
    tiles = choose_tma_tiles(M, N, K, *device, output_bytes)
    assert tma_shared_bytes(tiles, output_bytes) <= shared_bytes
    for other in TMA_TILES:
        if fits_tma(other, shared_bytes, output_bytes):
            assert tma_cost(tiles, M, N, K, processors) <= tma_cost(other, M, N, K, processors)


def test_rule_agrees_with_the_search_on_an_h100():
    """The fastest of 14 variants each; elsewhere the rule loses some percent."""
    for M, N, K in ((8192, 8192, 8192), (8192, 14336, 4096), (8192, 1024, 4096), (16_448, 4224, 1408)):
        assert choose_tma_tiles(M, N, K, *H100) == PAIR
    for M, N, K in ((8192, 4096, 14336), (8192, 1408, 16_448)):
        assert choose_tma_tiles(M, N, K, *H100) in (WIDE, TALL)
    assert choose_tma_tiles(1408, 1408, 16_448, *H100) == Tiles(64, 256, 128, 4, 4)
    assert choose_tma_tiles(64, 128, 4096, *H100).block_m == 64
    assert choose_tma_tiles(8192, 8192, 8192, 10_000, 132) is None


def test_rule_avoids_tiles_whose_wide_outputs_do_not_fit_the_processor_as_often_as_they_are_to_run():
    assert fits_tma(PAIR, 232_448, 2)
    assert not fits_tma(PAIR, 232_448, 4)
    assert choose_tma_tiles(8192, 14336, 4096, *H100, output_bytes=4) in (WIDE, TALL)


def test_buckets_are_within_an_eighth():
    for size in (1, 63, 64, 65, 257, 1000, 8192, 16_448, 131_073):
        assert size <= bucket(size) <= max(64, size + max(64, size / 8))
    assert bucket(8192) == 8192
    assert len({bucket(size) for size in range(8193, 16_385)}) == 8


def test_fastest_candidate_is_kept_for_the_next_process(tmp_path):
    path = tmp_path / "new" / "tiles.json"
    times = {WIDE: 3.0, TALL: 1.0, PERSISTENT: 2.0}
    tuned = TunedTiles(path)
    assert tuned.get(8000, 8192, 4096) is None
    assert tuned.add(8000, 8192, 4096, times, times.__getitem__) == TALL
    again = TunedTiles(path)
    assert again.get(8000, 8192, 4096) == TALL
    assert again.get(8001, 8190, 4095) == TALL
    assert again.get(4000, 8192, 4096) is None
    assert [file.name for file in path.parent.iterdir()] == ["tiles.json"]


def test_processes_that_tune_at_once_keep_both_choices(tmp_path):
    first, second = TunedTiles(tmp_path / "tiles.json"), TunedTiles(tmp_path / "tiles.json")
    first.add(64, 64, 64, [WIDE], lambda _: 1.0)
    second.add(128, 64, 64, [TALL], lambda _: 1.0)
    merged = TunedTiles(tmp_path / "tiles.json")
    assert (merged.get(64, 64, 64), merged.get(128, 64, 64)) == (WIDE, TALL)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"1x1x1": [1]}', '{"1x1x1": [7, 7, 7, 1, 1, 0]}', '{"1x1x1": null}']
)
def test_damaged_file_is_ignored_with_a_warning(tmp_path, text):
    path = tmp_path / "tiles.json"
    path.write_text(text)
    with pytest.warns(UserWarning, match=r"tiles.json: ignored, .* delete it"):
        assert TunedTiles(path).get(1, 1, 1) is None


def test_unwritable_folder_costs_a_warning(tmp_path):
    (tmp_path / "file").write_text("")
    tuned = TunedTiles(tmp_path / "file" / "tiles.json")
    with pytest.warns(UserWarning, match=r"cannot be written .* set QRECIPES_CACHE"):
        assert tuned.add(64, 64, 64, [WIDE], lambda _: 1.0) == WIDE
    assert tuned.get(64, 64, 64) == WIDE


DEVICE = torch.device("cuda", 0)


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    """Limits of an H100 and an empty table, without a device."""
    tuned = TunedTiles(tmp_path / "tiles.json")
    monkeypatch.setattr(int8_matmul, "device_limits", lambda device: DeviceLimits((9, 0), 132, 232_448))
    monkeypatch.setattr(int8_tune, "table", lambda device: tuned)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    int8_matmul._plan.cache_clear()
    yield tuned
    int8_matmul._plan.cache_clear()


def test_plan_reads_with_tma_what_it_can_and_copies_what_is_large(hopper):
    def uses_tma(M: int, N: int, K: int, readable: bool) -> bool:
        return int8_matmul._plan(DEVICE, M, N, K, readable, 2).tma_processors == 132

    assert uses_tma(16, 16, 16, True)
    assert uses_tma(8192, 4096, 4096, False)
    assert not uses_tma(256, 256, 256, False)
    assert not uses_tma(64, 8192, 8192, False)


def test_plan_prefers_what_was_measured_if_it_fits(hopper):
    hopper.add(8192, 14336, 4096, [TALL], lambda _: 1.0)
    assert int8_matmul._plan(DEVICE, 8192, 14336, 4096, True, 2).tiles == TALL
    hopper.add(8192, 8192, 8192, [PERSISTENT], lambda _: 1.0)
    assert int8_matmul._plan(DEVICE, 8192, 8192, 8192, True, 2).tiles == PERSISTENT
    assert int8_matmul._plan(DEVICE, 8192, 8192, 8192, True, 4).tiles in (WIDE, TALL)


def test_devices_without_tma_never_use_it(monkeypatch):
    monkeypatch.setattr(int8_matmul, "device_limits", lambda device: DeviceLimits((8, 0), 108, 166_912))
    int8_matmul._plan.cache_clear()
    assert int8_matmul._plan(DEVICE, 8192, 8192, 8192, True, 2).tma_processors == 0
    int8_matmul._plan.cache_clear()


def test_shapes_are_tuned_once_on_demand_and_not_during_capture(hopper, monkeypatch):
    tuned_shapes = []

    def tune(M, N, K, device):
        tuned_shapes.append((M, N, K))
        hopper.add(M, N, K, [TALL], lambda _: 1.0)

    monkeypatch.setattr(int8_matmul, "tune", tune)
    int8_matmul._plan(DEVICE, 4096, 4096, 4096, True, 2)
    assert tuned_shapes == []
    monkeypatch.setenv("QRECIPES_INT8_TUNE", "1")
    int8_matmul._plan.cache_clear()
    for M in (4096, 4090, 4096):
        assert int8_matmul._plan(DEVICE, M, 4096, 4096, True, 2).tiles == TALL
    assert tuned_shapes == [(4096, 4096, 4096)]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    int8_matmul._plan(DEVICE, 8192, 4096, 4096, True, 2)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(int8_tune, "MAX_SHAPES", 1)
    int8_matmul._plan(DEVICE, 2048, 4096, 4096, True, 2)
    assert tuned_shapes == [(4096, 4096, 4096)]


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("QRECIPES_CACHE", raising=False)
    assert int8_tune.cache_folder() == tmp_path / "qrecipes"
    monkeypatch.setenv("QRECIPES_CACHE", str(tmp_path / "here"))
    assert int8_tune.cache_folder() == tmp_path / "here"


def compiled_for_hopper(tiles: Tiles, output: str):
    """The TMA kernel as the launch specializes it for aligned operands and a bias in bfloat16."""
    from qrecipes.quant.int8_kernels import _tma_kernel

    constants = {"SCALED": output != "i32", "PROGRAMS": 132 * tiles.per_processor} | blocks_of(tiles)
    types = {
        "a_desc": f"tensordesc<i8[{tiles.block_m},{tiles.block_k}]>",
        "b_desc": f"tensordesc<i8[{tiles.block_n},{tiles.block_k}]>",
    } | types_of(output)
    return compiled(_tma_kernel, 90, types, constants, **options_of(tiles))


def blocks_of(tiles: Tiles) -> dict[str, int]:
    """Constants of a launch; scales and bias are contiguous."""
    strides = dict.fromkeys(("row_stride", "col_stride", "bias_stride"), 1)
    blocks = {"BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k, "GROUP_M": 8}
    return strides | blocks


def types_of(output: str) -> dict[str, str]:
    pointers = {"out_ptr": f"*{output}", "row_ptr": "*fp32", "col_ptr": "*fp32", "bias_ptr": "*bf16"}
    return pointers | dict.fromkeys(("M", "N", "K"), "i32")


def options_of(tiles: Tiles) -> dict[str, object]:
    return {"num_stages": tiles.num_stages, "num_warps": tiles.num_warps, "enable_fp_fusion": False}


@needs_triton
@pytest.mark.parametrize("output", ["bf16", "fp32", "i32"])
@pytest.mark.parametrize("tiles", TMA_TILES, ids=str)
def test_compiled_kernel_needs_no_more_shared_memory_than_the_rule_says(tiles, output):
    """And multiplies by warp groups, from blocks that TMA loads."""
    kernel = compiled_for_hopper(tiles, output)
    assert kernel.metadata.shared <= tma_shared_bytes(tiles, 2 if output == "bf16" else 4)
    assert "wgmma.mma_async" in kernel.asm["ptx"]
    assert "cp.async.bulk.tensor" in kernel.asm["ptx"]


@needs_triton
@pytest.mark.parametrize(
    ("tiles", "capability"), [*((pair[0], 80) for pair in TILES), (TILES[0][0], 90)], ids=str
)
def test_the_kernel_without_tma_uses_integer_tensor_cores_and_fits_where_the_rule_takes_it(tiles, capability):
    """K-major operands, K no multiple of the block; the other tiles of a pair are the mirror image."""
    from qrecipes.quant.int8_kernels import _pointer_kernel

    constants = {"SCALED": True, "RAGGED_K": True, "stride_ak": 1, "stride_bk": 1} | blocks_of(tiles)
    types = {"a_ptr": "*i8", "b_ptr": "*i8", "stride_am": "i32", "stride_bn": "i32"} | types_of("bf16")
    kernel = compiled(_pointer_kernel, capability, types, constants, **options_of(tiles))
    assert ("wgmma.mma_async" if capability == 90 else "mma.sync.aligned.m16n8k32") in kernel.asm["ptx"]
    assert ".s32.s8.s8" in kernel.asm["ptx"]
    assert kernel.metadata.shared <= tiles.shared_bytes


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
def test_the_tile_scaled_kernel_fits_every_device_and_does_not_contract_its_sums(capability):
    from qrecipes.quant.int8_kernels import _tile_scaled_kernel

    constants = {"GROUP_M": 8, "BLOCK_M": 64, "TILE": 128}
    constants |= dict.fromkeys(("stride_ak", "stride_bk", "stride_sak", "stride_sbn"), 1)
    types = {"a_ptr": "*i8", "b_ptr": "*i8", "a_scale_ptr": "*fp32", "b_scale_ptr": "*fp32"}
    types |= dict.fromkeys(("stride_am", "stride_bn"), "i32") | types_of("bf16")
    types |= dict.fromkeys(("stride_sam", "stride_sbk"), "i32 any")
    options = {"num_stages": 3, "num_warps": 8, "enable_fp_fusion": False}
    kernel = compiled(_tile_scaled_kernel, capability, types, constants, **options)
    assert kernel.metadata.shared <= SHARED_BYTES["RTX 4090"]
    assert ".s32.s8.s8" in kernel.asm["ptx"]
    assert "fma.rn.f32" not in kernel.asm["ptx"]


def test_file_is_json_that_people_can_read(tmp_path):
    path = tmp_path / "tiles.json"
    TunedTiles(path).add(64, 128, 256, [WIDE], lambda _: 1.0)
    assert json.loads(path.read_text()) == {"64x128x256": [128, 256, 128, 4, 8, 0]}
