"""The verification report, and what an export does about numbers that float16 cannot hold."""

import base64
import html.parser
import json

import cv2
import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("diffusers")

from tiny_model import shared, write_overflowing
from torch import nn

from pidiff.export import report as reports
from pidiff.export.bundle import ExportOptions, export_bundle
from pidiff.export.errors import ExportError
from pidiff.export.picture import compare
from pidiff.export.ranges import HALF_MAX, float32_islands, largest_of, measure
from pidiff.export.source import Source
from pidiff.runtime.bundle import REPORTS, Bundle


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("values, largest", [
    ([1.0, -3.0], 3.0), ([1.0, float("-inf")], 1.0), ([float("inf")], torch.finfo(torch.float32).max),
    ([float("nan"), 1.0], torch.finfo(torch.float32).max), ([], 0.0)])
def test_the_largest_value(values, largest, dtype):
    """A mask of -inf is no value, a number that is none is the largest."""
    found = torch.tensor(values, dtype=dtype)
    assert largest_of(found) == largest == largest_of(({"a": [found]}, torch.tensor([7]), "text"))


class Loud(nn.Module):
    """A block whose middle leaves float16, and comes back where `norm` is."""

    def __init__(self):
        super().__init__()
        self.first, self.loud, self.norm, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)
        with torch.no_grad():
            self.loud.weight.mul_(1e5)

    def forward(self, x):
        return self.last(self.norm(self.loud(self.first(x))))


def test_the_island_is_what_computes_or_is_given_what_float16_cannot_hold():
    torch.manual_seed(0)
    module, x = Loud(), 10 * torch.randn(8, 4)
    expected = module(x).detach()
    found = measure("loud", module, [{"x": x}])
    assert found.worst == "loud" and found.largest > HALF_MAX and set(found.islands) == {"loud", "norm"}
    assert found.open == {"loud"} and "it computes" in found.islands["loud"] and "it is given" in found.islands["norm"]
    module.half()
    with torch.no_grad():
        assert not torch.isfinite(module(x.half())).all(), "this test needs a module that overflows"
        with float32_islands(module, found):
            got = module(x.half())
            assert module.loud.weight.dtype == torch.float32 and module.last.weight.dtype == torch.float16
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.float(), expected, atol=2e-2, rtol=2e-2)
    assert module.loud.weight.dtype == torch.float16 and not any("forward" in vars(m) for m in module.modules())


def test_a_sum_that_overflows_makes_an_island_of_the_module_that_adds():
    class Adds(nn.Module):
        def forward(self, x):
            return (x * 200 + x * 150) / 400

    module = nn.Sequential(Adds())
    found = measure("adds", module, [{"input": torch.full((1, 2), 190.0)}])
    assert set(found.islands) == {"0"} and not found.open
    with float32_islands(module, found):
        assert torch.allclose(module(torch.full((1, 2), 190.0).half()).float(), torch.tensor(166.25))


def test_a_result_that_does_not_fit_is_refused_and_a_mask_is_no_number():
    with pytest.raises(ExportError, match="graph g must take and give numbers that float16 holds, got 1e.05, and 1e.05 in 0: exp"):
        measure("g", nn.Sequential(nn.ReLU()), [{"input": torch.full((2,), 1e5)}])
    masked = measure("g", nn.Sequential(nn.Softmax(-1)), [{"input": torch.tensor([1.0, float("-inf")])}])
    assert masked.islands == {} and masked.largest == 1


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory):
    """A bundle in float16 of a model that overflows it, and its report in full."""
    folder = tmp_path_factory.mktemp("overflowing")
    export_bundle(Source(write_overflowing(folder / "model")), folder / "bundle", ExportOptions(fp16=True, report="full"))
    return folder / "bundle"


@pytest.mark.slow
def test_a_model_that_overflows_is_exported_with_layers_in_float32(overflowing):
    bundle = Bundle.open(overflowing)
    kept = bundle.manifest.float32_layers
    assert set(kept) == {"unet"} and set(kept["unet"]) == {"unet.up_blocks.1.attentions.1", "unet.conv_norm_out"}
    report = json.loads((overflowing / "report.json").read_text())
    assert report["float16"]["unet"]["worst_layer"].startswith("unet.up_blocks.1.attentions.1")
    assert report["float16"]["unet"]["largest"] > HALF_MAX and report["float16"]["unet"]["kept_in_float32"] == kept["unet"]
    assert report["float16"]["text_encoder"]["kept_in_float32"] == {}
    assert bundle.manifest.parity["unet"]["max_rel"] < 1e-2
    # The graph itself: the weights of the island are stored in half and cast.
    graph = onnx.load(overflowing / "unet.onnx", load_external_data=False).graph
    casts = {n.input[0] for n in graph.node if n.op_type == "Cast" and n.attribute[0].i == onnx.TensorProto.FLOAT}
    assert any("up_blocks.1.attentions.1.proj_out.weight" in c for c in casts)
    assert not any("mid_block" in c and c.endswith("proj_out.weight") for c in casts)


@pytest.mark.slow
def test_the_report_is_in_the_bundle_and_needs_no_other_file(overflowing):
    bundle = Bundle.open(overflowing)
    assert set(REPORTS) <= set(bundle.manifest.files)
    report, page = json.loads((overflowing / "report.json").read_text()), (overflowing / "report.html").read_text()
    assert report["version"] == reports.VERSION
    for graph, figures in bundle.manifest.parity.items():
        assert report["graphs"][graph]["onnxruntime"].items() >= figures.items()
        assert f"<td>{graph}<td>onnxruntime" in page

    class Links(html.parser.HTMLParser):
        found = []

        def handle_starttag(self, tag, attributes):
            self.found += [v for k, v in attributes if k in ("src", "href", "data") or tag in ("script", "link")]

    links = Links()
    links.feed(page)
    assert links.found and all(v.startswith("data:image/png;base64,") for v in links.found)
    pictures = [cv2.imdecode(np.frombuffer(base64.b64decode(v.split(",")[1]), np.uint8), cv2.IMREAD_COLOR) for v in links.found]
    drawn = [e for e, f in report["picture"]["figures"].items() if "problem" not in f]
    assert len(pictures) == len(drawn) and "onnxruntime" in drawn and pictures[0].shape == (64, 64, 3)
    figures = report["picture"]["figures"]["onnxruntime"]
    assert compare(pictures[0], pictures[1]) == {k: figures[k] for k in ("psnr_db", "max_levels")}
    assert figures["psnr_db"] is None or figures["psnr_db"] > 25
    assert -1 <= figures["code_similarity_to_pytorch"] <= 1 and "no face-recognition score" in page


@pytest.mark.slow
def test_other_engines_are_measured_where_they_are(overflowing):
    pytest.importorskip("openvino")
    report = json.loads((overflowing / "report.json").read_text())
    for graph, found in report["graphs"].items():
        assert found["openvino"]["max_rel"] < 5e-2 and found["openvino"]["computed_in"] in ("float32", "bfloat16"), graph
    assert report["picture"]["figures"]["openvino"]["max_levels"] >= 0


def test_a_short_report_costs_nothing_and_none_is_none(tmp_path_factory):
    fused = shared("fused", tmp_path_factory)
    source = Source(shared("parallel", tmp_path_factory))
    assert reports.check_mode("auto", source) == "full"
    assert [reports.check_mode(m, source) for m in ("short", "none")] == ["short", "none"]
    with pytest.raises(ExportError, match="report must be one of auto, full, short, none, got 'long'"):
        reports.check_mode("long", source)
    assert not set(REPORTS) & set(Bundle.open(shared("fp16", tmp_path_factory)).manifest.files)       # made with --report none
    report, page = json.loads((fused / "report.json").read_text()), (fused / "report.html").read_text()
    assert report["picture"] is None and "None was drawn" in page and "Nothing is computed in float16" in page
    assert {e for g in report["graphs"].values() for e in g} == {"onnxruntime"}


def test_large_models_get_a_short_report_and_a_full_one_needs_memory(tmp_path_factory, monkeypatch):
    source = Source(shared("parallel", tmp_path_factory))
    monkeypatch.setattr(reports, "LARGE", 100)
    assert reports.check_mode("auto", source) == "short" and reports.check_mode("full", source) == "full"
    monkeypatch.setattr(reports, "available_memory", lambda: 1 << 20)
    with pytest.raises(ExportError, match="memory must be at least 1.0 GiB for a full report of this model, got 0.0 GiB"):
        reports.check_mode("full", source)


def test_text_in_a_report_is_escaped():
    report = {"bundle": "<script>alert(1)</script>", "precision": "fp32", "attention": "fused", "opset": 18, "reference": "r",
              "tools": {}, "graphs": {"unet": {"openvino": {"problem": "a <b> & c"}}}, "float16": {}, "picture": None,
              "compiled_engines": {}, "int8": None}
    page = reports.make_html(report, {})
    assert "<script" not in page and "a &lt;b&gt; &amp; c" in page
