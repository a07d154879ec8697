"""The routing statistics against counts made by hand, and the pictures that are drawn from them."""

import html
import json
import re
from math import log2
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from grok1.analysis.curves import curves_figure
from grok1.analysis.figures import PALETTE, routing_figure, save_figure
from grok1.analysis.page import ink, routing_page
from grok1.analysis.routing import RoutingStatistics, load_bars, readable, routing_statistics
from grok1.cli import app
from modeling_grok1 import Grok1ForCausalLM, GrokConfig


SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
SIZES |= {"num_key_value_heads": 2, "num_experts": 4, "max_position_embeddings": 12}


@pytest.fixture(scope="module")
def model() -> Grok1ForCausalLM:
    torch.manual_seed(0)
    return Grok1ForCausalLM(GrokConfig(**SIZES, initializer_range=0.5)).eval()


@pytest.fixture
def four_tokens() -> RoutingStatistics:
    """One layer, four tokens, four experts: the pairs 0 2, 2 0, 0 1, 3 2."""
    return RoutingStatistics(
        experts=np.array([[[0, 2], [2, 0], [0, 1], [3, 2]]]),
        gates=np.array([[[0.5, 0.25], [0.5, 0.5], [0.75, 0.0], [0.25, 0.25]]], dtype=np.float32),
        token_entropy=np.array([[1.0, 2.0, 0.0, 1.0]], dtype=np.float32),
        num_experts=4,
    )


def test_shares_of_four_tokens(four_tokens):
    assert four_tokens.load.tolist() == [[3 / 8, 1 / 8, 3 / 8, 1 / 8]]
    assert four_tokens.entropy.tolist() == [1.0]
    assert four_tokens.gate_mass.tolist() == [(0.75 + 1 + 0.75 + 0.5) / 4]
    assert four_tokens.top_pairs == [((0, 2), 0.5)], "the order within a pair does not matter"
    assert four_tokens.to_dict() == {
        "layers": 1,
        "tokens": 4,
        "load": [[0.375, 0.125, 0.375, 0.125]],
        "entropy_bits": [1.0],
        "gate_mass": [0.75],
        "top_pairs": [{"experts": [0, 2], "share": 0.5}],
    }
    twice = RoutingStatistics.join([four_tokens, four_tokens])
    assert twice.experts.shape == (1, 8, 2) and twice.load.tolist() == four_tokens.load.tolist()


def test_a_models_choices_token_by_token(model):
    """Against the router's own module, called on what it was given in the run."""
    ids = torch.arange(20).view(2, 10)
    seen = {}
    hooks = [
        layer.block_sparse_moe.gate.register_forward_hook(lambda m, args, out, i=i: seen.__setitem__(i, args[0]))
        for i, layer in enumerate(model.model.layers)
    ]
    statistics = routing_statistics(model, ids)
    for hook in hooks:
        hook.remove()
    assert statistics.experts.shape == statistics.gates.shape == (3, 20, 2)
    for i, layer in enumerate(model.model.layers):
        rows = layer.block_sparse_moe.gate.weight.tolist()
        for n in range(20):
            x = seen[i][n].tolist()
            scores = [sum(a * b for a, b in zip(row, x, strict=True)) for row in rows]
            weights = np.exp(np.array(scores) - max(scores))
            p = (weights / weights.sum()).tolist()
            order = sorted(range(4), key=lambda e: -p[e])[:2]
            assert statistics.experts[i, n].tolist() == order
            assert statistics.gates[i, n].tolist() == pytest.approx([p[e] for e in order], abs=1e-5)
            assert statistics.token_entropy[i, n] == pytest.approx(-sum(q * log2(q) for q in p), abs=1e-4)


def test_padding_is_not_counted(model):
    ids = torch.arange(1, 11)[None]
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), ids], dim=1)
    mask = (padded != 0).long()
    alone, masked = routing_statistics(model, ids), routing_statistics(model, padded, mask)
    assert (masked.experts == alone.experts).all()
    assert masked.token_entropy == pytest.approx(alone.token_entropy, abs=1e-4)


def test_the_linear_layout_routes_the_same(model, tmp_path):
    model.save_pretrained(tmp_path)
    linear = Grok1ForCausalLM.from_pretrained(tmp_path, experts_layout="linear")
    ids = torch.arange(10)[None]
    assert (routing_statistics(linear, ids).experts == routing_statistics(model, ids).experts).all()


def test_a_row_longer_than_the_context_is_refused(model):
    with pytest.raises(ValueError, match="expected at most 12 tokens per row, found 13"):
        routing_statistics(model, torch.zeros(1, 13, dtype=torch.long))


def test_bars_for_a_terminal(four_tokens):
    # 3/8 is 1.5 of an even share, 1/8 half of one; a full block is twice the even share.
    assert load_bars(four_tokens).splitlines() == [
        "expert   ▕0 1 2 3▏",
        "layer  0 ▕▆ ▂ ▆ ▂▏",
        "▄ = 25 % of the layer's assignments, the uniform share; █ = 50 % or more",
    ]


def test_the_picture_has_the_same_bytes_every_time(model, tmp_path):
    statistics = routing_statistics(model, torch.arange(12)[None])
    for suffix, magic in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        for name in ("a", "b"):
            figure = routing_figure(statistics, [f"t{i}" for i in range(12)], "A title")
            save_figure(figure, tmp_path / f"{name}{suffix}")
        data = (tmp_path / f"a{suffix}").read_bytes()
        assert data.startswith(magic)
        assert data == (tmp_path / f"b{suffix}").read_bytes()
        if suffix == ".png":
            assert int.from_bytes(data[16:20], "big") == 2000, "200 dpi"
    with pytest.raises(ValueError, match=r"ends in \.png"):
        save_figure(figure, tmp_path / "picture.gif")


def test_the_picture_shows_the_numbers(four_tokens):
    figure = routing_figure(four_tokens, ["a", " b", "\n", "a long token"], "Title")
    axes = {axis.get_title(): axis for part in figure.subfigs for axis in part.axes}
    load = axes["Expert load: share of a layer's\nassignments (%, white = uniform)"]
    assert load.images[0].get_array().tolist() == [[37.5, 12.5, 37.5, 12.5]]
    assert [text.get_text() for text in load.texts] == ["38%", "12%", "38%", "12%"]
    assert axes["Router entropy: mean\nover the tokens (bits)"].lines[0].get_xdata().tolist() == [1.0]
    strip = axes["Top-1 expert of each token of a passage (colour = expert)"]
    assert strip.images[0].get_array().tolist() == [[0, 2, 0, 3]]
    assert [label.get_text() for label in strip.get_xticklabels()] == ["a", "·b", "⏎", "a·long·to…"]
    assert figure.get_suptitle() == "Title"


def test_the_pages_colours_are_those_of_the_experts(four_tokens):
    page = routing_page(four_tokens, ["<b>", "x", "&", "é"], 'a "title"')
    text = re.search(r"<details open>.*?<p>(.*?)</p>", page, re.S)[1]
    spans = re.findall(r'class="e(\d)" title="([^"]*)">(.*?)<sub>(\d)</sub>', text)
    assert [int(number) for number, *_ in spans] == [0, 2, 0, 3]
    for number, colour in enumerate(PALETTE):
        assert f".e{number} {{ background: {colour}; color: {ink(colour)}; }}" in page
    assert [html.unescape(token) for *_, token, _ in spans] == ["<b>", "x", "&", "é"]
    assert [int(number) for *_, number in spans] == [0, 2, 0, 3]
    assert spans[0][1] == "experts 0 (0.50), 2 (0.25)"
    assert "<script" not in page and "a &quot;title&quot;" in page
    assert "most frequent pair 0 and 2, 50% of the tokens" in page


def test_pieces_are_shown_as_text():
    assert [readable(piece) for piece in ("▁the", "▁▁", "<0x0A>", "<0xE2>", "<b>", "<0x>")] == [
        *(" the", "  ", "\n", "<0xE2>", "<b>", "<0x>"),
    ]


def contrast(a: str, b: str) -> float:
    """WCAG 2.2: (lighter + 0.05) / (darker + 0.05) of relative luminances."""

    def luminance(colour: str) -> float:
        digits = colour.lstrip("#")
        digits = "".join(2 * c for c in digits) if len(digits) == 3 else digits
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_the_writing_on_every_colour_can_be_read():
    for colour in PALETTE:
        assert contrast(colour, ink(colour)) >= 4.5, colour


def test_the_page_is_bounded_for_many_layers(four_tokens):
    """64 layers of 2,048 tokens: at most 5 MB, and the page says how much of the text it shows."""
    experts = np.tile(four_tokens.experts, (64, 512, 1))
    gates = np.tile(four_tokens.gates, (64, 512, 1))
    entropy = np.tile(four_tokens.token_entropy, (64, 512))
    page = routing_page(RoutingStatistics(experts, gates, entropy, 4), ["a token"] * 2048, "64 layers")
    assert len(page.encode()) < 5_000_000 and page.count("<details") == 64
    assert "The first 512 of 2,048 tokens" in page and page.count("<sub>") == 64 * 512


def test_the_curves_of_a_training_run(tmp_path):
    log = [{"step": n, "loss": 5 - n / 10, "aux_loss": 2 + 1 / n} for n in range(1, 6)] + [{"step": 5, "eval_loss": 4}]
    figure = curves_figure(log, 2, 8)
    loss, balance = figure.axes
    assert [line.get_ydata()[-1] for line in loss.lines] == [4.5, 4]
    assert list(balance.lines[0].get_ydata()) == [2 + 1 / n for n in range(1, 6)]
    assert balance.get_xlabel() == "step; 2 = uniform load, 8 = the same experts for every token"
    with pytest.raises(ValueError, match="expected entries with `loss`, found none"):
        curves_figure([{"step": 1, "train_runtime": 3.0}])
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 5, "epoch": 1.0, "log_history": log}))
    result = CliRunner().invoke(app, ["curves", str(tmp_path), "--out", str(tmp_path / "c.svg")])
    assert result.exit_code == 0 and "6 log entries. 5 steps, 1.00 epochs." in result.stdout
    assert (tmp_path / "c.svg").read_bytes().startswith(b"<?xml")


def test_without_matplotlib_the_next_step_is_named(four_tokens, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r'pip install "modeling-grok1\[plot\]"'):
        routing_figure(four_tokens, ["a"])


def test_the_command(model, tmp_path, monkeypatch):
    """With a tokenizer of single characters: windows of the context's length, JSON, picture and page."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz "
    backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate(letters)}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    model.save_pretrained(tmp_path / "m")
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / "m")
    text = "the quick brown fox jumps over it"
    (tmp_path / "text.txt").write_text(text)
    arguments = ["routing", str(tmp_path / "m"), "--text", str(tmp_path / "text.txt")]
    result = CliRunner().invoke(app, [*arguments, "--json", "--tokens", "30"])
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    ids = torch.tensor([[letters.index(c) for c in text[:30]]])
    expected = RoutingStatistics.join([routing_statistics(model, row) for row in ids.split(12, dim=1)])
    assert figures == expected.to_dict() and figures["tokens"] == 30

    out, page = tmp_path / "routing.png", tmp_path / "routing.html"
    result = CliRunner().invoke(app, [*arguments, "--out", str(out), "--html", str(page), "--passage", "8"])
    assert result.exit_code == 0, result.output
    assert out.read_bytes().startswith(b"\x89PNG") and page.read_text().count("<details") == 3
    assert "33 tokens through 3 layers" in result.stdout and result.stdout.count("▕") == 4
    Path(tmp_path / "text.txt").write_text("")
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "found an empty file" in result.stderr
