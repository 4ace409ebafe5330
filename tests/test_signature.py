"""Signed bundles: minisign's format, what is refused, and that a change never keeps an old signature."""

import base64
import builtins
import json
import shutil
import stat
from pathlib import Path

import cv2
import pytest
from drawn_face import drawn_face
from tiny_bundle import edit, write_tiny_bundle
from tiny_engines import add

pytest.importorskip("cryptography")

from pidiff.export.__main__ import main as export
from pidiff.runtime import Pipeline, bundle as bundles
from pidiff.runtime.__main__ import enroll, generate
from pidiff.runtime.bundle import Bundle, BundleError, BundleWriter
from pidiff.runtime.engine_store import EngineStore
from pidiff.runtime.signature import check_signature, load_public_key, load_secret_key, new_key, sign

# A key, and a signature of the text "test", that minisign itself made; from its documentation.
MINISIGN_KEY = "RWQf6LRCGA9i53mlYecO4IzT51TGPpvWucNSCh1CBM0QTaLn73Y7GFO3"
MINISIGN_SIGNATURE = """untrusted comment: signature from minisign secret key
RUQf6LRCGA9i559r3g7V1qNyJDApGip8MfqcadIgT9CuhV3EMhHoN1mGTkUidF/z7SrlQgXdy8ofjb7bNJJylDOocrCo8KLzZwo=
trusted comment: timestamp:1633700835\tfile:test\tprehashed
wLMDjy9FLAuxZ3q4NlEvkgtyhrr0gtTu6KC4KBJdITbbOeAi1zBIYo0v4iTgt8jJpIidRJnp94ABQkJAgAooBQ==
"""


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Two pairs of keys: [(secret, public), (secret, public)]."""
    folder = tmp_path_factory.mktemp("keys")
    return [new_key(folder / name) for name in ("mine", "other")]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture
def signed(plain, keys, tmp_path):
    path = Path(shutil.copytree(plain, tmp_path / "b"))
    assert export(["--into", str(path), "--sign", str(keys[0][0])]) == 0
    return path


def refused(path, key, words):
    with pytest.raises(BundleError, match=words) as caught:
        Bundle.open(path, require_signature=key)
    assert "\n" not in str(caught.value)


def test_minisign_itself_is_understood(tmp_path):
    path = tmp_path / "test.minisig"
    path.write_text(MINISIGN_SIGNATURE)
    assert check_signature(b"test", path, load_public_key(MINISIGN_KEY)).startswith("timestamp:1633700835")
    with pytest.raises(BundleError, match="must be the signature of this"):
        check_signature(b"tesu", path, load_public_key(MINISIGN_KEY))
    path.write_text(MINISIGN_SIGNATURE.replace("1633700835", "1733700835"))
    with pytest.raises(BundleError, match="or an altered one"):
        check_signature(b"test", path, load_public_key(MINISIGN_KEY))


def test_a_signed_bundle_opens_with_its_key_and_without_one(signed, keys):
    text = keys[0][1].read_text().split("\n")[1]
    for key in (keys[0][1], str(keys[0][1]), text):
        assert Bundle.open(signed, require_signature=key).manifest.name == "tiny"
    assert Bundle.open(signed).manifest.name == "tiny"
    assert Pipeline.from_bundle(signed, require_signature=text).bundle.path == signed
    assert not list(signed.glob("engines")), "nothing but the signature was added"


def test_keys_are_written_for_their_owner_and_never_over_others(keys, tmp_path, capsys):
    secret, public = keys[0]
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600 and load_secret_key(secret).id == load_public_key(public).id
    with pytest.raises(BundleError, match="new key must be a name without files, got"):
        new_key(secret.with_suffix(""))
    assert export(["--new-key", str(tmp_path / "k")]) == 0 and {p.name for p in tmp_path.iterdir()} == {"k.key", "k.pub"}
    assert str(tmp_path / "k.pub") in capsys.readouterr().out


def test_missing_and_foreign_signatures(plain, signed, keys):
    refused(plain, keys[0][1], "it must be signed by key [0-9A-F]{16}, got no manifest.sig")
    refused(signed, keys[1][1], "it must be signed by key [0-9A-F]{16}, got a signature by key [0-9A-F]{16}")
    public = load_public_key(keys[1][1])
    forged = type(load_secret_key(keys[0][0]))(public.id, load_secret_key(keys[0][0]).seed)      # claims the other key's name
    (signed / "manifest.sig").write_bytes(sign((signed / "manifest.json").read_bytes(), forged, "x"))
    refused(signed, keys[1][1], "must be the signature of this manifest.json")


def test_a_changed_manifest_is_not_even_parsed(signed, keys, monkeypatch):
    edit(signed, lambda m: m.update(name="mallory"))
    monkeypatch.setattr(bundles.Manifest, "from_json", lambda text: pytest.fail("the manifest was parsed"))
    refused(signed, keys[0][1], "must be the signature of this manifest.json, got that of another")


def test_a_changed_file_of_a_signed_bundle(signed, keys):
    file = signed / "unet.onnx"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    refused(signed, keys[0][1], "unet.onnx must have the sha256")


@pytest.mark.parametrize("change, words", [
    (lambda d: d[:40], "be a text of 4 lines|must be a text of 4 lines"), (lambda d: b"", "must be a text of 4 lines"),
    (lambda d: d + b"more\n", "must be a text of 4 lines"), (lambda d: b"\xff" * 99, "must be a text file"),
    (lambda d: d.replace(d.split(b"\n")[1], d.split(b"\n")[1][:-4]), "must be a whole signature, got [0-9]+ bytes instead of 74"),
    (lambda d: d.replace(d.split(b"\n")[1], b"!" * 100), "must be a whole signature, got no base64"),
    (lambda d: d * 40, "must be a text of 4 lines"), (lambda d: d.replace(b"file:", b"flie:"), "or an altered one"),
])
def test_damaged_signatures(signed, keys, change, words):
    file = signed / "manifest.sig"
    file.write_bytes(change(file.read_bytes()))
    refused(signed, keys[0][1], words)


def test_a_signature_that_is_a_link_is_no_part_of_a_bundle(signed, keys, tmp_path):
    (signed / "manifest.sig").rename(tmp_path / "elsewhere")
    (signed / "manifest.sig").symlink_to(tmp_path / "elsewhere")
    refused(signed, keys[0][1], "must be a regular file, got a link")


@pytest.mark.parametrize("text, words", [
    ("", "be a text of 2 lines|must be a text of 2 lines"), ("untrusted comment: x\nRWQf6LRC\n", "must be a public key .* bytes instead of 42"),
    ("untrusted comment: x\n" + base64.b64encode(b"XX" + bytes(40)).decode() + "\n", "must be an Ed25519 public key")])
def test_keys_that_are_none(signed, keys, tmp_path, text, words):
    (tmp_path / "bad").write_text(text)
    refused(signed, tmp_path / "bad", words)
    refused(signed, tmp_path / "none.pub", "require_signature must be a readable file, got .*none.pub: the folder does not exist")
    with pytest.raises(BundleError, match="sign must"):
        load_secret_key(keys[0][1])


def test_a_secret_key_with_a_password_or_damage(keys, tmp_path):
    comment, line, _ = keys[0][0].read_text().split("\n")
    data = bytearray(base64.b64decode(line))
    for at, value, words in ((2, ord("S"), "without a password"), (70, data[70] ^ 1, "whole secret key")):
        other = data[:at] + bytes([value]) + data[at + 1:]
        (tmp_path / "k").write_text(f"{comment}\n{base64.b64encode(other).decode()}\n")
        with pytest.raises(BundleError, match=words):
            load_secret_key(tmp_path / "k")


def test_hashes_cannot_be_skipped_where_a_signature_is_required(signed, keys):
    with pytest.raises(BundleError, match="verify must be True with require_signature"):
        Bundle.open(signed, verify=False, require_signature=keys[0][1])


def test_another_engine_drops_the_signature_until_it_is_signed_again(signed, keys):
    add(signed, unet=b"code")
    assert not (signed / "manifest.sig").exists() and Bundle.open(signed).manifest.engines
    refused(signed, keys[0][1], "got no manifest.sig")
    with pytest.raises(BundleError, match="got no manifest.sig"), EngineStore(signed, keys[0][1]):
        pass
    with EngineStore(signed) as store:
        store.sign(load_secret_key(keys[1][0]))
    assert Bundle.open(signed, require_signature=keys[1][1]).engine(next(iter(store.manifest.engines)), "unet") == b"code"
    with EngineStore(signed, keys[1][1]) as store:
        store.drop_older(next(iter(store.manifest.engines.values())))       # nothing to drop
        assert not store.lost_signature
    assert (signed / "manifest.sig").exists()


def test_a_new_bundle_is_signed_before_it_appears(plain, keys, tmp_path):
    fields = {k: v for k, v in json.loads((plain / "manifest.json").read_text()).items() if k not in ("files", "schema_version")}
    with BundleWriter(tmp_path / "new") as writer:
        shutil.copytree(plain, writer.path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
        writer.commit(load_secret_key(keys[0][0]), **fields)
    assert Bundle.open(tmp_path / "new", require_signature=keys[0][1]).manifest.name == "tiny"
    assert (tmp_path / "new" / "manifest.sig").read_text().split("\n")[2] == "trusted comment: PIDiff bundle 'tiny' file:manifest.json"


def test_commands_refuse_what_is_not_signed(plain, keys, tmp_path, capsys):
    arguments = ["--bundle", str(plain), "--require-signature", str(keys[0][1])]
    photo, out = str(tmp_path / "p.png"), tmp_path / "out"
    assert generate(["--face", photo, "--prompt", "a", "--out", f"{out}.png", *arguments]) == 1
    assert enroll([photo, "--out", f"{out}.safetensors", *arguments]) == 1
    for command in (["--check", str(plain)], ["--into", str(plain), "--sign", str(keys[0][0])], [str(plain), str(out)]):
        assert export([*command, *arguments[2:]]) == 1
    said = capsys.readouterr().err.strip().split("\n")
    assert len(said) == 5 and all("got no manifest.sig" in line for line in said), said
    assert not list(tmp_path.iterdir())


@pytest.fixture
def data_and_training():
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    from pidiff.data.__main__ import main as data
    from pidiff.train.__main__ import main as train

    return data, train


@pytest.mark.parametrize("which, words", [("plain", "got no manifest.sig"), ("signed", "got a signature by key")])
def test_data_and_training_refuse_too_and_write_nothing(plain, signed, keys, tmp_path, capsys, data_and_training, which, words):
    data, train = data_and_training
    key = ["--require-signature", str(keys[1][1])]
    bundle = str({"plain": plain, "signed": signed}[which])
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    (photos / "p.jpg").write_bytes(b"no picture")
    for command in (["photos", str(photos), "--bundle", bundle], ["synth", "--model", bundle]):
        assert data([*command, "--out", str(out), *key]) == 1
    assert train(["personalize", str(photos / "p.jpg"), "--model", bundle, "--out", str(out), *key]) == 1
    said = capsys.readouterr().err.strip().split("\n")
    assert len(said) == 3 and all(words in line for line in said), said
    assert not out.exists()


def test_data_and_training_take_what_is_signed(signed, keys, tmp_path, capsys, data_and_training, monkeypatch):
    data, train = data_and_training
    key = ["--require-signature", str(keys[0][1])]
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    cv2.imwrite(str(photos / "p.png"), drawn_face(256))
    assert data(["photos", str(photos), "--bundle", str(signed), "--out", str(out), "--size", "128", *key]) == 0
    assert (out / "photos-0000.tar").is_file()
    # It goes as far as the weights, which this bundle has not.
    assert data(["synth", "--model", str(signed), "--out", str(tmp_path / "more"), *key]) == 1
    assert train(["personalize", str(photos / "p.png"), "--model", str(signed), "--out", str(tmp_path / "me"), *key]) == 1
    said = capsys.readouterr().err
    assert "manifest" not in said and "signed" not in said, said


def test_evaluation_refuses_too(plain, keys, tmp_path, capsys):
    from pidiff.evaluate.__main__ import main, make_generator, parse

    (tmp_path / "e.onnx").write_bytes(b"")
    arguments = ["--data", str(tmp_path), "--embedder", str(tmp_path / "e.onnx"), "--out", str(tmp_path / "out"),
                 "--require-signature", str(keys[0][1])]
    with pytest.raises(BundleError, match="got no manifest.sig"):
        make_generator(parse([*arguments, "--bundle", str(plain)]), None)
    assert main([*arguments, "--checkpoint", str(plain)]) == 1
    assert "--require-signature must be given for a bundle, which has a signature, got --checkpoint" in capsys.readouterr().err


def test_without_the_extra_the_sentence_names_it(signed, keys, monkeypatch):
    find = builtins.__import__

    def without(name, *rest):
        if name.startswith("cryptography"):
            raise ImportError(name)
        return find(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    refused(signed, keys[0][1], "signatures need the extra 'sign' .*, got no cryptography")
    monkeypatch.undo()
    assert Bundle.open(signed, require_signature=keys[0][1])
