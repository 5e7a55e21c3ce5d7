"""Blocks, embedding and head are found in the models that builders make, and named where there are none."""

import pytest
import torch
from torch import nn

from qrecipes.config.run import ModelSection
from qrecipes.errors import ConfigError
from qrecipes.models.build import build
from qrecipes.models.view import ModelView, block_sites, vocab_size

DECODER = {
    "vocab_size": 64,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 32,
    "max_seq_len": 16,
}


def made(source: str, device: str = "cpu", **args) -> nn.Module:
    return build(ModelSection(source=source, args=args), dtype=torch.float32, device=device)


def test_view_of_a_decoder_recomputes_its_output():
    """Embedding, blocks, norm and head, one after the other, are the whole model."""
    tokens = torch.arange(16).view(1, 16)
    for args in ({}, {"tie_word_embeddings": False}):
        model = made("torchtune:llama3_2.llama3_2", **DECODER, **args)
        view = ModelView.of(model)
        hidden = view.embeddings[0](tokens)
        for block in view.blocks:
            hidden = block(hidden)
        assert torch.equal(view.head(view.norm(hidden)).float(), model(tokens))
        assert (view.width, view.vocab_size, view.num_classes, len(view.blocks)) == (32, 64, None, 3)


def test_view_of_a_classifier_of_text():
    view = ModelView.of(made("torchtune:llama2.llama2_classifier", **DECODER, num_classes=2))
    assert (view.vocab_size, view.num_classes) == (64, 2)


def test_view_of_a_fusion_model_is_that_of_its_decoder():
    pytest.importorskip("torchvision")
    model = made("torchtune:llama3_2_vision_11b", device="meta")
    view = ModelView.of(model)
    assert (view.width, len(view.blocks), view.num_classes) == (4096, 32, None)
    assert view.vocab_size == vocab_size(model) == 128_256 + 8
    sites = block_sites(model)
    assert {site.block for site in sites} >= set(view.blocks)
    assert {site.block for site in sites} >= set(model.encoder.clip.layers)


def test_view_of_a_vision_transformer():
    pytest.importorskip("timm")
    for num_classes in (0, 10):
        args = {"img_size": 32, "patch_size": 8, "depth": 2, "num_classes": num_classes}
        model = made("timm:vit_tiny_patch16_224", **args)
        view = ModelView.of(model)
        assert view.blocks == tuple(model.blocks)
        assert (view.width, view.vocab_size, view.num_classes) == (192, None, num_classes)
        assert view.head is model.head
    assert vocab_size(model) is None


def test_model_without_these_parts_says_what_was_looked_for():
    with pytest.raises(ConfigError) as error:
        ModelView.of(nn.Sequential(nn.Linear(2, 2)))
    for word in ("Sequential", "tok_embeddings", "patch_embed", "it has: 0"):
        assert word in str(error.value)


def test_a_site_is_where_a_block_can_be_replaced():
    model = made("torchtune:llama3_2.llama3_2", **DECODER)
    sites = block_sites(model)
    assert [site.block for site in sites] == list(model.layers)
    for site in sites:
        setattr(site.parent, site.name, nn.Identity())
    assert all(isinstance(layer, nn.Identity) for layer in model.layers)


def test_one_block_is_found_where_the_builder_names_it():
    assert len(block_sites(made("torchtune:llama3_2.llama3_2", **(DECODER | {"num_layers": 1})))) == 1


@pytest.mark.parametrize(
    ("name", "block", "count"),
    [
        ("vit_tiny_patch16_224", "Block", 12),
        ("swin_tiny_patch4_window7_224", "SwinTransformerBlock", 12),
        ("convnext_atto", "ConvNeXtBlock", 12),
        ("resnet18", "BasicBlock", 8),
    ],
)
def test_blocks_of_timm_models(name, block, count):
    pytest.importorskip("timm")
    assert [type(site.block).__name__ for site in block_sites(made(f"timm:{name}", device="meta"))] == [
        block
    ] * count


def test_blocks_of_any_model_are_the_class_of_its_largest_container():
    def stage(width: int) -> nn.Sequential:
        return nn.Sequential(*[nn.Linear(width, width) for _ in range(2)])

    model = nn.Module()
    model.small, model.activations = stage(4), nn.Sequential(nn.ReLU(), nn.ReLU())
    model.large, model.mixed = stage(8), nn.Sequential(nn.Linear(99, 99), nn.ReLU())
    assert [site.block for site in block_sites(model)] == [*model.small, *model.large]


def test_model_without_blocks_is_refused():
    with pytest.raises(ConfigError, match="no blocks"):
        block_sites(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))


def test_vocabulary_of_encoders():
    text = {"embed_dim": 32, "num_heads": 2, "num_layers": 2}
    assert vocab_size(made("torchtune:clip.clip_text_encoder", device="meta", **text)) == 49_408
