"""The words of the command line, by what they are about: each file adds its commands and hands them to their stages."""

from __future__ import annotations

import argparse
from collections.abc import Callable

Handler = Callable[[argparse.Namespace], int]
Add = Callable[[str, str, Handler], argparse.ArgumentParser]
"""name, help and handler of a command -> its parser"""
