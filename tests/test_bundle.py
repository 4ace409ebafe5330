"""The bundle format: what is written can be read, and nothing else can."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_bundle import edit, write_tiny_bundle

from pidiff.runtime import bundle as bundle_module
from pidiff.runtime import manifest as manifest_module
from pidiff.runtime.bundle import Bundle, BundleError, BundleWriter, Manifest, sha256_file, shipped_bundle


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "b"))


def refused(path, match, verify=True):
    with pytest.raises(BundleError, match=match) as caught:
        Bundle.open(path, verify)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


# --- reading ---------------------------------------------------------------------------------------------------------

def test_opens_and_round_trips(whole):
    bundle = Bundle.open(whole)
    m = bundle.manifest
    assert m.name == "tiny" and m.model.latent_shape == (4, 4, 4) and m.model.unet.channels == (4, 6)
    assert bundle.graph("unet").tensor("latents").shape == ("B", 4, 4, 4)
    assert Manifest.from_dict(m.to_dict()) == m
    assert Manifest.from_json((whole / "manifest.json").read_bytes()) == m
    assert set(m.files) == {str(p.relative_to(whole)) for p in whole.rglob("*") if p.is_file()} - {"manifest.json"}
    assert bundle.directions()["smile"].shape == (4, 512)
    assert bundle.file("schedule.json").is_file() and bundle.json("schedule.json")["beta_end"] == 0.02


def test_unknown_names(whole):
    bundle = Bundle.open(whole)
    with pytest.raises(BundleError, match="must hold the graph vae_encoder"):
        bundle.graph("vae_encoder")
    for name in ("nothing.json", "../tiny/schedule.json", "/etc/passwd", "manifest.json"):
        with pytest.raises(BundleError, match="must hold"):
            bundle.file(name)


def test_shipped_bundle_is_the_default(monkeypatch, whole):
    monkeypatch.setattr(bundle_module, "shipped_bundle", lambda: whole)
    assert Bundle.open().path == whole
    assert shipped_bundle().parts[-2:] == ("models", "mini")


def test_missing(tmp_path):
    refused(tmp_path / "none", "must be a directory made by pidiff-export, got .*none, which does not exist")
    refused(tmp_path, "without a manifest.json")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "got the file")


@pytest.mark.parametrize("name", ["unet.onnx", "tokenizer/tokenizer.json", "directions.safetensors"])
def test_one_changed_byte(copy, name):
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    refused(copy, f"{name} must have the sha256 .* the file was damaged or changed")
    assert Bundle.open(copy, verify=False).path == copy


@pytest.mark.parametrize("keep", [0, 1, 100])
def test_truncated_file(copy, keep):
    data = (copy / "unet.onnx").read_bytes()
    (copy / "unet.onnx").write_bytes(data[:keep])
    refused(copy, f"unet.onnx must have {len(data)} bytes, got {keep}", verify=False)


def test_missing_and_unlisted_files(copy):
    (copy / "extra.bin").write_bytes(b"x")
    refused(copy, "got the unlisted extra.bin")
    (copy / "extra.bin").unlink()
    (copy / "unet.onnx").unlink()
    refused(copy, "unet.onnx must be present")


def test_links_and_special_files(copy, tmp_path):
    (copy / "unet.onnx").rename(tmp_path / "elsewhere")
    (copy / "unet.onnx").symlink_to(tmp_path / "elsewhere")
    refused(copy, "unet.onnx must be a regular file, got a link or a special file")
    (copy / "unet.onnx").unlink()
    os.mkfifo(copy / "unet.onnx")
    refused(copy, "unet.onnx must be a regular file")


def test_linked_folder(copy, tmp_path):
    (copy / "tokenizer").rename(tmp_path / "t")
    (copy / "tokenizer").symlink_to(tmp_path / "t")
    refused(copy, "tokenizer must be a regular file, got a link")


def test_manifest_that_is_a_link_or_a_pipe(copy, tmp_path):
    (copy / "manifest.json").rename(tmp_path / "m")
    (copy / "manifest.json").symlink_to(tmp_path / "m")
    refused(copy, "must be readable")
    (copy / "manifest.json").unlink()
    os.mkfifo(copy / "manifest.json")  # opening must not wait for a writer
    refused(copy, "manifest.json must be a regular file")


def test_manifest_size_limit(copy):
    (copy / "manifest.json").write_bytes(b" " * (manifest_module.MAX_MANIFEST_BYTES + 1))
    refused(copy, "manifest.json must be at most")


@pytest.mark.parametrize("text, match", [
    (b"", "valid JSON"), (b"{", "valid JSON"), (b"\xff\xfe{}", "valid JSON"), (b"[" * 100_000, "valid JSON"),
    (b"[]", "schema_version must be 1 to 4"), (b"3", "schema_version must be 1"), (b"{}", "schema_version must be 1"),
    (b'{"schema_version": 1, "schema_version": 1}', "must not repeat a key, got 'schema_version' twice"),
    (b'{"schema_version": NaN}', "must hold finite numbers, got NaN"),
    (b'{"schema_version": 1}', "must have the key 'name'"), (b'{"schema_version": 2}', "must have the key 'name'"),
])
def test_broken_json(copy, text, match):
    (copy / "manifest.json").write_bytes(text)
    refused(copy, match)


@pytest.mark.parametrize("version", [0, 5, 99, "2", 2.0, True, None])
def test_unknown_schema_version(copy, version):
    edit(copy, lambda m: m.update(schema_version=version))
    refused(copy, "schema_version must be 1 to 4 for this PIDiff, got .*: export the bundle again")


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../b", "a//b", ".hidden", "a\\b", "a/", "", "C:x", "x\0y", "a\nb",
                                  "manifest.json", "MANIFEST.json", "manifest.sig", "a/" * 300 + "b"])
def test_unsafe_paths(copy, path):
    edit(copy, lambda m: m["files"].update({path: {"sha256": "0" * 64, "size": 1}}))
    refused(copy, "files must be plain relative paths inside the bundle")


def test_paths_that_differ_in_case_only(copy):
    edit(copy, lambda m: m["files"].update({"UNET.onnx": {"sha256": "0" * 64, "size": 1}}))
    refused(copy, "different paths")


def set_in(*keys, value):
    def change(m):
        for key in keys[:-1]:
            m = m[key]
        m[keys[-1]] = value
    return change


@pytest.mark.parametrize("change, match", [
    (set_in("surprise", value=1), "must not have unknown keys, got 'surprise'"),
    (set_in("model", "surprise", value=1), "model must not have unknown keys"),
    (set_in("model", "identity", "mode", value="both"), "mode must be parallel or residual"),
    (set_in("model", "text_length", value=-1), "text_length must be a positive integer"),
    (set_in("model", "text_length", value=True), "text_length must be a positive integer"),
    (set_in("model", "image_size", value=33), "multiple of vae_scale_factor"),
    (set_in("model", "image_size", value=10**9 * 8), "up to 8192"),
    (set_in("model", "unet", "heads", value=[3, 3]), "channels must be multiples of heads"),
    (set_in("precision", value="int4"), "precision must be fp32 or fp16"),
    (set_in("family", value="sdxl"), "family must be sd1"),
    (set_in("opset", value="18"), "opset must be a positive integer"),
    (set_in("graphs", "unet", "file", value="other.onnx"), "must be listed in files"),
    (set_in("graphs", "unet", "inputs", value=[]), "a list of tensors"),
    (set_in("graphs", "unet", "inputs", 0, "name", value="noise"), "must map latents, time_row"),
    (set_in("graphs", "unet", "inputs", 0, "dtype", value="float64"), "dtype must be float32 or float16 or int64"),
    (set_in("graphs", "unet", "inputs", 0, "shape", value=["B", 0]), "sizes or axis names"),
    (set_in("files", "unet.onnx", "sha256", value="G" * 64), "a sha256 digest"),
    (set_in("files", "unet.onnx", "size", value=-1), "a size in bytes"),
    (set_in("files", "unet.onnx", "size", value=1e3), "a size in bytes"),
    (set_in("scheduler", "solver", value=5), "scheduler must hold only"),
    (set_in("scheduler", "speed", value=5), "scheduler must hold only"),
    (set_in("scheduler", "timestep_spacing", value="even"), "scheduler must hold only"),
    (set_in("scheduler", "eta", value=1.5), "scheduler must hold only"),
    (set_in("scheduler", "eta", value=True), "scheduler must hold only"),
    (set_in("sources", "a", value="xyz"), "a sha256 digest"),
    (set_in("parity", value={"unet": {"max_abs": 1}}), "parity.unet must have the key"),
    (set_in("parity", value={"unet": {"max_abs": "1", "mean_abs": 0, "max_rel": 0}}), "a finite number"),
    (lambda m: m["graphs"].pop("unet"), "graphs must hold unet"),
    (lambda m: m["graphs"].pop("time_conditioner"), "graphs must hold time_conditioner"),
    (lambda m: m["files"].pop("schedule.json"), "files must list schedule.json"),
    (lambda m: m.pop("parity"), "must have the key 'parity'"),
])
def test_strict_fields(copy, change, match):
    refused(edit(copy, change), match)


def test_directions_of_another_shape(tmp_path, whole):
    copy = Path(shutil.copytree(whole, tmp_path / "b"))
    save_file({"smile": np.zeros((3, 512), np.float32)}, copy / "directions.safetensors")
    entry = {"sha256": sha256_file(copy / "directions.safetensors"), "size": (copy / "directions.safetensors").stat().st_size}
    edit(copy, lambda m: m["files"].update({"directions.safetensors": entry}))
    with pytest.raises(BundleError, match=r"directions.safetensors smile must be \[4, 512\] float32, got \[3, 512\]"):
        Bundle.open(copy).directions()


def test_every_truncation_of_the_manifest_is_refused(copy):
    text = (copy / "manifest.json").read_bytes()
    for keep in range(0, len(text) - 2, 97):
        (copy / "manifest.json").write_bytes(text[:keep])
        refused(copy, "manifest.json must")


# --- writing ---------------------------------------------------------------------------------------------------------

def fields(whole):
    data = json.loads((whole / "manifest.json").read_text())
    return {k: v for k, v in data.items() if k not in ("files", "schema_version")}


def fill(writer, whole):
    shutil.copytree(whole, writer.path, dirs_exist_ok=True)
    (writer.path / "manifest.json").unlink()


def leftovers(folder):
    return sorted(p.name for p in folder.iterdir())


def test_writer_accepts_its_own_reader(tmp_path, whole):
    with BundleWriter(tmp_path / "deep" / "out") as writer:
        fill(writer, whole)
        manifest = writer.commit(**fields(whole))
    assert Bundle.open(tmp_path / "deep" / "out").manifest == manifest
    assert leftovers(tmp_path / "deep") == ["out"]
    assert (tmp_path / "deep" / "out").stat().st_mode & 0o777 == 0o777 & ~bundle_module.umask()


def test_writer_takes_an_empty_directory_and_no_other(tmp_path, whole):
    (tmp_path / "out").mkdir()
    with BundleWriter(tmp_path / "out") as writer:
        fill(writer, whole)
        writer.commit(**fields(whole))
    before = sha256_file(tmp_path / "out" / "manifest.json")
    with pytest.raises(BundleError, match="out must be a new or empty directory, got"):
        BundleWriter(tmp_path / "out").__enter__()
    (tmp_path / "file").write_text("x")
    with pytest.raises(BundleError, match="out must be a new or empty directory"):
        BundleWriter(tmp_path / "file").__enter__()
    assert sha256_file(tmp_path / "out" / "manifest.json") == before and leftovers(tmp_path) == ["file", "out"]


def test_writer_loses_a_race_cleanly(tmp_path, whole):
    with pytest.raises(BundleError, match="new or empty"), BundleWriter(tmp_path / "out") as writer:
        fill(writer, whole)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("x")
        writer.commit(**fields(whole))
    assert leftovers(tmp_path) == ["out"] and leftovers(tmp_path / "out") == ["mine"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError, MemoryError])
def test_writer_cleans_up(tmp_path, whole, error):
    with pytest.raises(error), BundleWriter(tmp_path / "out") as writer:
        fill(writer, whole)
        raise error
    assert leftovers(tmp_path) == []


def test_writer_without_commit_leaves_nothing(tmp_path, whole):
    with BundleWriter(tmp_path / "out") as writer:
        fill(writer, whole)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EDQUOT, "quota"),
                                   RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")])
def test_full_disk(tmp_path, whole, error):
    with pytest.raises(BundleError, match="out must be on a disk with enough room, got a full disk"):
        with BundleWriter(tmp_path / "out") as writer:
            fill(writer, whole)
            raise error
    assert leftovers(tmp_path) == []


def test_full_disk_while_flushing(tmp_path, whole, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(bundle_module.os, "fsync", full)
    with pytest.raises(BundleError, match="full disk"), BundleWriter(tmp_path / "out") as writer:
        fill(writer, whole)
        writer.commit(**fields(whole))
    assert leftovers(tmp_path) == []


def test_writer_refuses_bad_content(tmp_path, whole):
    def attempt(change, match):
        with pytest.raises(BundleError, match=match), BundleWriter(tmp_path / "out") as writer:
            fill(writer, whole)
            good = fields(whole)
            change(writer.path, good)
            writer.commit(**good)
        assert leftovers(tmp_path) == []

    attempt(lambda path, f: (path / "link").symlink_to("/etc/passwd"), "link must be a regular file")
    attempt(lambda path, f: (path / ".hidden").write_text("x"), "plain relative paths")
    attempt(lambda path, f: f.update(opset=0), "opset must be a positive integer")
    attempt(lambda path, f: f.update(parity={"unet": {"max_abs": float("nan"), "mean_abs": 0, "max_rel": 0}}), "finite")
    attempt(lambda path, f: (path / "unet.onnx").unlink(), "graphs.unet file must be listed")


def test_killed_writer_leaves_no_bundle(tmp_path):
    """SIGINT in the middle of an export: nothing is left."""
    code = ("import sys, os, signal; from pidiff.runtime.bundle import BundleWriter\n"
            "with BundleWriter(sys.argv[1]) as w:\n"
            "    (w.path / 'a').write_bytes(b'x' * 1000); os.kill(os.getpid(), signal.SIGINT); (w.path / 'b').write_bytes(b'')")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True,
                          cwd=tmp_path)
    assert "KeyboardInterrupt" in done.stderr and leftovers(tmp_path) == []


def test_hashing_is_streamed(tmp_path):
    import hashlib

    data = np.random.default_rng(0).bytes(3_500_001)
    (tmp_path / "f").write_bytes(data)
    assert sha256_file(tmp_path / "f") == hashlib.sha256(data).hexdigest()
