"""sign and verify: a signature holds for these files and this key, and for no others; OpenSSF's own program agrees."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("model_signing")
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa


def write_key(folder: Path, name: str, password: bytes = b"", made: Any = None) -> tuple[Path, Path]:
    key = made or ec.generate_private_key(ec.SECP256R1())
    how = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how))
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public


@pytest.fixture()
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "more").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "more" / "weights.bin").write_bytes(b"1234")
    return folder


CHANGES: dict[str, Callable[[Path], Any]] = {
    "changed": lambda model: (model / "config.json").write_text("{ }"),
    "added": lambda model: (model / "new.py").write_text("x"),
    "removed": lambda model: (model / "more" / "weights.bin").unlink(),
    "renamed": lambda model: (model / "config.json").rename(model / "config2.json"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_signature_holds_until_a_file_changes(change: str, model: Path, tmp_path: Path, tongwen: Any) -> None:
    private, public = write_key(tmp_path, "a")
    assert tongwen("sign", model, "--key", private)[0] == 0
    signature = tmp_path / "model.sig"
    words = ("verify", model, "--signature", signature, "--key", public)
    assert tongwen(*words)[0] == 0
    CHANGES[change](model)
    code, _, err = tongwen(*words)
    assert code == 4 and "does not hold" in err and str(model) in err


def test_openssf_program_accepts_our_signature_and_we_accept_theirs(model: Path, tmp_path: Path, tongwen: Any) -> None:
    private, public = write_key(tmp_path, "a")
    assert tongwen("sign", model, "--key", private, "--out", tmp_path / "ours.sig")[0] == 0

    def theirs(*words: object) -> int:
        command = [sys.executable, "-m", "model_signing", *map(str, words)]
        return subprocess.run(command, capture_output=True, check=False).returncode

    assert theirs("verify", "key", model, "--signature", tmp_path / "ours.sig", "--public_key", public) == 0
    assert theirs("sign", "key", model, "--signature", tmp_path / "theirs.sig", "--private_key", private) == 0
    assert tongwen("verify", model, "--signature", tmp_path / "theirs.sig", "--key", public)[0] == 0


def test_other_keys_are_refused(model: Path, tmp_path: Path, tongwen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    private, _ = write_key(tmp_path, "a", b"secret")
    _, other = write_key(tmp_path, "b")
    rsa_key, rsa_public = write_key(tmp_path, "c", made=rsa.generate_private_key(65537, 2048))
    code, _, err = tongwen("sign", model, "--key", private)
    assert code == 2 and "TONGWEN_KEY_PASSWORD" in err
    monkeypatch.setenv("TONGWEN_KEY_PASSWORD", "wrong")
    code, _, err = tongwen("sign", model, "--key", private)
    assert code == 2 and "wrong" not in err
    monkeypatch.setenv("TONGWEN_KEY_PASSWORD", "secret")
    assert tongwen("sign", model, "--key", private)[0] == 0
    assert tongwen("verify", model, "--signature", tmp_path / "model.sig", "--key", other)[0] == 4
    plain, _ = write_key(tmp_path, "d")
    code, _, err = tongwen("sign", model, "--key", plain, "--out", tmp_path / "x.sig")
    assert code == 2 and "unset TONGWEN_KEY_PASSWORD" in err
    monkeypatch.delenv("TONGWEN_KEY_PASSWORD")
    for key in (rsa_key, model / "config.json", tmp_path):
        code, _, err = tongwen("sign", model, "--key", key, "--out", tmp_path / "x.sig")
        assert code == 2 and "openssl" in err, key
    assert tongwen("verify", model, "--signature", tmp_path / "model.sig", "--key", rsa_public)[0] == 2
    assert tongwen("verify", model, "--signature", model / "config.json", "--key", other)[0] == 4


def test_signature_overwrites_nothing(model: Path, tmp_path: Path, tongwen: Any) -> None:
    private, public = write_key(tmp_path, "a")
    assert tongwen("sign", model, "--key", private, "--out", model / "model.sig")[0] == 2
    (tmp_path / "model.sig").write_text("mine")
    assert tongwen("sign", model, "--key", private)[0] == 2 and (tmp_path / "model.sig").read_text() == "mine"
    assert tongwen("sign", model, "--key", private, "--out", private)[0] == 2
    assert tongwen("sign", tmp_path / "no", "--key", private)[0] == 2
    assert tongwen("verify", model, "--key", public)[0] == 2
    assert tongwen("verify", model, "--signature", tmp_path / "no.sig", "--key", public)[0] == 2


def test_missing_package_is_named(model: Path, tmp_path: Path, tongwen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    private, _ = write_key(tmp_path, "a")
    for name in [name for name in sys.modules if name.startswith("model_signing")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "model_signing", None)
    code, _, err = tongwen("sign", model, "--key", private)
    assert code == 5 and "pip install 'tongwen[sign]'" in err
