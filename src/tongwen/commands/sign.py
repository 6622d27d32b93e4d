"""sign: a signature over all files of a model, in the format of OpenSSF Model Signing; `verify` checks it.

Keys are files of the user; nothing is sent anywhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tongwen.core import console, originals
from tongwen.core.errors import ArtifactError, MachineError, MissingPackage, RecipeError, first_line
from tongwen.core.i18n import _

PASSWORD = "TONGWEN_KEY_PASSWORD"  # noqa: S105 - the variable's name
EXAMPLE = "openssl ecparam -name prime256v1 -genkey -noout -out key.pem; openssl ec -in key.pem -pubout -out public.pem"


def run(path: str, key: str, out: str) -> int:
    """Write the signature of a file or folder.

    Raises:
        RecipeError: No such path, no such key, or the signature would lie among the signed files.
    """
    target = _existing(path)
    signature = Path(out or f"{path.rstrip('/')}.sig")
    originals.check_new(signature, inputs=(path, key))
    if target.is_dir() and signature.resolve().is_relative_to(target.resolve()):
        raise RecipeError(
            _("the signature would lie among the files that it signs"),
            place=str(signature),
            remedy=f"--out {target.name}.sig",
        )
    signing, hashing = _import("signing"), _import("hashing")
    with _key_errors(key):
        password = os.environ.get(PASSWORD)
        how = signing.Config().use_elliptic_key_signer(
            private_key=_existing(key), password=password.encode() if password else None
        )
    with _file_errors(path), console.waiting(_("hashing {path}").format(path=path)):
        how.set_hashing_config(hashing.Config().set_allow_symlinks(True)).sign(target, signature)
    console.success(str(signature))
    console.info(f"  tongwen verify {path} --signature {signature} --key PUBLIC_KEY")
    console.emit({"path": path, "signature": str(signature)})
    return 0


def check(path: str, signature: str, key: str) -> int:
    """Return 0 if the signature is the key's, and all files are the signed ones.

    Raises:
        RecipeError: No such path, signature or key.
        ArtifactError: Another key signed, or a file was changed, added or removed.
    """
    target, file = _existing(path), _existing(signature)
    verifying, hashing = _import("verifying"), _import("hashing")
    with _key_errors(key):
        how = verifying.Config().use_elliptic_key_verifier(public_key=_existing(key))
    try:
        with _file_errors(path), console.waiting(_("hashing {path}").format(path=path)):
            how.set_hashing_config(hashing.Config().set_allow_symlinks(True)).verify(target, file)
    except (ValueError, TypeError, KeyError) as error:  # what model-signing and its parsers raise
        raise ArtifactError(
            _("the signature does not hold: {error}").format(error=first_line(error)),
            place=f"{path} · {signature}",
            remedy=_("fetch the files again from their author, or ask for the right public key"),
        ) from None
    console.success(_("{path}: all files are as {signature} signed them").format(path=path, signature=signature))
    console.emit({"path": path, "signature": signature, "key": key, "verified": True})
    return 0


def _existing(name: str) -> Path:
    if not Path(name).exists():
        raise RecipeError(_("this path does not exist"), place=name)
    return Path(name)


def _import(module: str) -> Any:
    from importlib import import_module

    try:
        return import_module(f"model_signing.{module}")
    except ImportError:
        raise MissingPackage("model-signing", _("signatures"), "sign") from None


@contextmanager
def _key_errors(key: str) -> Iterator[None]:
    """Turn errors of a key's file into RecipeError. Its content is not repeated."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, OSError) as error:  # cryptography's, one for each kind of wrong key
        if "not encrypted" in str(error):
            rule, remedy = _("this key is not encrypted, but a password is given"), f"unset {PASSWORD}"
        elif "password" in str(error).lower():
            rule, remedy = _("this key is encrypted, and the password does not open it"), f"export {PASSWORD}=…"
        else:
            rule, remedy = _("this is no key of an elliptic curve in PEM"), EXAMPLE
        raise RecipeError(rule, place=f"--key {key}", remedy=remedy) from None


@contextmanager
def _file_errors(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MachineError(first_line(error), place=path) from None
