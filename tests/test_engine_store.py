"""Engines in a bundle: the manifest's section, what is handed out, and that a bundle is whole at every moment."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_bundle import edit, write_tiny_bundle
from tiny_engines import TARGETS, VERSION, add, engine_of

from pidiff.runtime import engine_store
from pidiff.runtime.bundle import Bundle, BundleError, Manifest
from pidiff.runtime.engine_specs import EngineSet
from pidiff.runtime.engine_store import EngineStore

NAME = "tensorrt-rtx-sm86+sm89-1.7.1.116"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture
def bundle(plain, tmp_path):
    """A bundle with two engines of a few bytes."""
    path = Path(shutil.copytree(plain, tmp_path / "b"))
    return add(path, unet=b"engine of the unet", vae_decoder=b"engine of the decoder")


def engine_files(path):
    return sorted(p.relative_to(path).as_posix() for p in (path / "engines").rglob("*") if p.is_file())


# --- versions of the manifest ----------------------------------------------------------------------------------------

def test_a_bundle_of_version_1_loads_and_is_upgraded_by_adding_an_engine(plain, tmp_path):
    def to_version_1(m):
        m["schema_version"] = 1
        del m["engines"], m["float32_layers"]

    path = edit(Path(shutil.copytree(plain, tmp_path / "b")), to_version_1)
    manifest = Bundle.open(path).manifest
    assert manifest.engines == {} and manifest.schema_version == 4 and manifest.float32_layers == {}
    assert Manifest.from_dict(manifest.to_dict()) == manifest
    add(path, unet=b"x")
    assert json.loads((path / "manifest.json").read_text())["schema_version"] == 4
    assert list(Bundle.open(path).manifest.engines) == [NAME]


def test_version_1_knows_no_engines_and_version_2_needs_them(bundle):
    edit(bundle, lambda m: (m.update(schema_version=1), m.pop("float32_layers")))
    with pytest.raises(BundleError, match="must not have unknown keys, got 'engines'"):
        Bundle.open(bundle)
    edit(bundle, lambda m: m.update(schema_version=3))
    with pytest.raises(BundleError, match="must have the key 'float32_layers'"):
        Bundle.open(bundle)
    edit(bundle, lambda m: (m.update(schema_version=2), m.pop("engines")))
    with pytest.raises(BundleError, match="must have the key 'engines'"):
        Bundle.open(bundle)


def test_engines_of_version_3_have_their_weights(bundle):
    edit(add(bundle, unet=b"x"), lambda m: m.update(schema_version=3))
    with pytest.raises(BundleError, match="must not have unknown keys, got 'left_out'"):
        Bundle.open(bundle)
    edit(bundle, lambda m: [(engine.pop("left_out"), engine.pop("driver")) for engine in m["engines"][NAME]["graphs"].values()])
    assert {e.left_out for e in Bundle.open(bundle).manifest.engines[NAME].graphs.values()} == {0}


# --- handing out -----------------------------------------------------------------------------------------------------

def test_engines_round_trip(bundle):
    opened = Bundle.open(bundle)
    engines = opened.manifest.engines[NAME]
    assert (engines.id, engines.backend, engines.version, engines.targets) == (NAME, "tensorrt-rtx", VERSION, TARGETS)
    assert set(engines.graphs) == {"unet", "vae_decoder"}
    assert engines.graphs["unet"].profiles[0]["id_mask"] == ((1, 1, 4, 4),) * 3
    assert Manifest.from_dict(opened.manifest.to_dict()) == opened.manifest
    assert opened.engine(NAME, "unet") == b"engine of the unet"
    assert opened.engine(NAME, "unet", limit=6) == b"engine"


def test_an_engine_is_handed_out_by_nothing_but_engine(bundle):
    opened = Bundle.open(bundle)
    with pytest.raises(BundleError, match="engines must be taken with Bundle.engine"):
        opened.file(f"engines/{NAME}/unet.engine")
    for name, graph in ((NAME, "text_encoder"), ("tensorrt-rtx-sm86-1", "unet"), ("..", "unet")):
        with pytest.raises(BundleError, match="must hold an engine"):
            opened.engine(name, graph)


@pytest.mark.parametrize("limit", [None, 4])
def test_a_tampered_engine_is_refused_even_if_opening_did_not_look(bundle, limit):
    opened = Bundle.open(bundle)
    file = bundle / "engines" / NAME / "unet.engine"
    file.write_bytes(b"engine of the UNET")
    with pytest.raises(BundleError, match="unet.engine must have the sha256 .* damaged or changed"):
        Bundle.open(bundle)
    for some in (opened, Bundle.open(bundle, verify=False)):
        with pytest.raises(BundleError, match="unet.engine must have the sha256 .* damaged or changed"):
            some.engine(NAME, "unet", limit)
    file.unlink()
    file.symlink_to("/etc/hostname")
    with pytest.raises(BundleError, match="unet.engine"):
        opened.engine(NAME, "unet", limit)


def at(*keys, value):
    def change(m):
        place = m["engines"]
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
    return change


UNET = (NAME, "graphs", "unet")


@pytest.mark.parametrize("change, match", [
    (at(NAME, "colour", value=1), "must not have unknown keys, got 'colour'"),
    (at(*UNET, "colour", value=1), "must not have unknown keys, got 'colour'"),
    (at(NAME, "backend", value="cuda"), "backend must be tensorrt-rtx"),
    (at(NAME, "version", value="../1"), "version must be a version number"),
    (at(NAME, "version", value="1.7.2"), "must be named after backend, targets and version, tensorrt-rtx-sm86.sm89-1.7.2"),
    (at(NAME, "targets", value=["sm89", "sm86"]), "different GPU targets in order"),
    (at(NAME, "targets", value=["sm86", "sm86"]), "different GPU targets in order"),
    (at(NAME, "targets", value=[]), "different GPU targets in order"),
    (at(NAME, "targets", value=["../x"]), "different GPU targets in order"),
    (at(*UNET, "file", value="schedule.json"), "file must be engines/.*/unet.engine and listed in files, got 'schedule.json'"),
    (at(*UNET, "onnx_sha256", value="1" * 64), "onnx_sha256 must be that of unet.onnx, got 1111"),
    (at(*UNET, "weights_sha256", value="1"), "weights_sha256 must be a sha256 digest"),
    (at(*UNET, "left_out", value=-1), "left_out must be a size in bytes"),
    (at(*UNET, "driver", value="new"), "driver must be a version number or empty"),
    (at(*UNET, "profiles", value=[]), "profiles must be a list of profiles"),
    (at(*UNET, "profiles", 0, value={}), "must have the key 'latents'"),
    (at(*UNET, "profiles", 0, "id_scale", value=[[1], [1]]), "smallest, best and largest shape"),
    (at(*UNET, "profiles", 0, "id_scale", value=[[1, 1]] * 3), "smallest, best and largest shape"),
    (at(*UNET, "profiles", 0, "id_scale", value=[[2], [1], [2]]), "smallest, best and largest shape"),
    (at(*UNET, "profiles", 0, "time_row", value=[[1, 6]] * 3), "smallest, best and largest shape"),
    (at(NAME, "graphs", "nothing", value={"file": "", "onnx_sha256": "", "weights_sha256": "", "profiles": [], "left_out": 0, "driver": ""}),
     "must belong to a graph of the bundle"),
    (lambda m: m["engines"][NAME]["graphs"].pop("unet"), "files must list engines only that the section engines describes"),
    (lambda m: m["files"].pop(f"engines/{NAME}/unet.engine"), "listed in files"),
])
def test_strict_fields(bundle, change, match):
    with pytest.raises(BundleError, match=match) as caught:
        Bundle.open(edit(bundle, change))
    assert "\n" not in str(caught.value)


# --- adding ----------------------------------------------------------------------------------------------------------

def test_engines_do_not_change_who_enrolled_a_person(plain, bundle):
    """`encoder_id` is made of the encoder's files; an engine of the encoder is not one of them."""
    before = Bundle.open(plain).encoder_id()
    assert Bundle.open(add(bundle, w_plus_encoder=b"engine")).encoder_id() == before


def test_leftovers_are_no_part_of_the_bundle_and_are_removed(bundle):
    folder = bundle / "engines" / "tensorrt-rtx-sm75-1.0"
    folder.mkdir()
    (folder / "unet.engine.part").write_bytes(b"half")
    opened = Bundle.open(bundle)
    with pytest.raises(BundleError, match="must hold"):
        opened.file("engines/tensorrt-rtx-sm75-1.0/unet.engine.part")
    with EngineStore(bundle):
        assert not folder.exists()
    assert engine_files(bundle) == [f"engines/{NAME}/unet.engine", f"engines/{NAME}/vae_decoder.engine"]
    (bundle / "engines" / "link").symlink_to(bundle / "unet.onnx")
    with pytest.raises(BundleError, match="engines/link must be a regular file"):
        Bundle.open(bundle)


def test_an_engine_is_replaced_and_older_versions_are_dropped(bundle):
    add(bundle, unet=b"another engine")
    opened = Bundle.open(bundle)
    assert opened.engine(NAME, "unet") == b"another engine" and opened.engine(NAME, "vae_decoder") == b"engine of the decoder"
    newer = EngineSet("tensorrt-rtx", "1.8", TARGETS, {})
    add(bundle, ("sm120",), unet=b"for another card")
    add(bundle, version="1.8", unet=b"by another version")
    with EngineStore(bundle) as store:
        store.drop_older(newer)
    assert set(Bundle.open(bundle).manifest.engines) == {newer.id, "tensorrt-rtx-sm120-1.7.1.116"}
    assert engine_files(bundle) == ["engines/tensorrt-rtx-sm120-1.7.1.116/unet.engine", f"engines/{newer.id}/unet.engine"]


KILLED = """
import os, signal, sys
from pidiff.runtime import engine_store
from pidiff.runtime.bundle import Bundle
from pidiff.runtime.engine_specs import EngineSet
path, last = sys.argv[1], int(sys.argv[2])
renames, real = [], os.replace
def replace(*names):
    if len(renames) == last:
        os.kill(os.getpid(), signal.SIGKILL)
    renames.append(names)
    real(*names)
engine_store.os.replace = replace
with engine_store.EngineStore(path) as store:
    engines = store.manifest.engines[sys.argv[3]]
    store.part(engines, "unet").write_bytes(b"the new engine")
    store.add(engines, "unet", engines.graphs["unet"])
"""


@pytest.mark.parametrize("last, unet", [(0, b"engine of the unet"), (1, None), (2, None), (3, b"the new engine")])
def test_a_kill_at_any_moment_leaves_a_whole_bundle(bundle, last, unet):
    """Replacing an engine takes three renames; the process is killed before each of them, or not at all."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(bundle), str(last), NAME], cwd=bundle.parent)
    assert done.returncode == (0 if last == 3 else -9)
    opened = Bundle.open(bundle)
    assert opened.engine(NAME, "vae_decoder") == b"engine of the decoder"
    assert ("unet" in opened.manifest.engines[NAME].graphs) == (unet is not None)
    if unet:
        assert opened.engine(NAME, "unet") == unet
    add(bundle, unet=b"built again")
    assert Bundle.open(bundle).engine(NAME, "unet") == b"built again"
    assert engine_files(bundle) == [f"engines/{NAME}/unet.engine", f"engines/{NAME}/vae_decoder.engine"]


def test_one_export_at_a_time(bundle):
    with EngineStore(bundle), pytest.raises(BundleError, match="bundle must not be in use by another export, got .*b: "):
        EngineStore(bundle).__enter__()
    with EngineStore(bundle):
        pass


def test_damage_is_found_before_anything_is_added(bundle):
    (bundle / "unet.onnx").write_bytes((bundle / "unet.onnx").read_bytes()[:-1] + b"?")
    with pytest.raises(BundleError, match="unet.onnx must have the sha256"):
        EngineStore(bundle).__enter__()
    (bundle / "manifest.json").unlink()
    with pytest.raises(BundleError, match="without a manifest.json"):
        EngineStore(bundle).__enter__()


def test_an_error_while_writing_the_manifest_keeps_the_old_one(bundle, monkeypatch):
    before = (bundle / "manifest.json").read_bytes()
    engines = Bundle.open(bundle).manifest.engines[NAME]
    with pytest.raises(BundleError, match="enough room, got a full disk"), EngineStore(bundle) as store:
        store.part(engines, "text_encoder").write_bytes(b"x")
        monkeypatch.setattr(engine_store.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
        store.add(engines, "text_encoder", engine_of(bundle, engines, "text_encoder"))
    assert (bundle / "manifest.json").read_bytes() == before
    assert engine_files(bundle) == [f"engines/{NAME}/unet.engine", f"engines/{NAME}/vae_decoder.engine"]
    assert Bundle.open(bundle) and not [p for p in os.listdir(bundle) if p.endswith(".part")]
