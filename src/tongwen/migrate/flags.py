"""Flags with their values become words of a recipe, or options of a command; each flag gets one verdict.

The tables say where a flag goes, a reader what its old value means today. What is given twice with two values, lacks
its value or is known to nobody is a problem; all problems are raised together.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tongwen.core.errors import RecipeError, TongwenError
from tongwen.core.i18n import N_, _
from tongwen.migrate.flag_values import READERS, CorrectedValue, MigrationContext, RemovedFlag
from tongwen.migrate.tables import FlagRule, OldProgram, spoken
from tongwen.recipe.aliases import OLD, OLD_REASONS, OWNED, training_arguments


@dataclass
class Verdict:
    """What became of one flag. verdict: kept | renamed | mended | dropped; becomes: its word today; why: the reason."""

    flag: str
    value: Any
    verdict: str
    becomes: str = ""
    why: str = ""


@dataclass
class FlagReader:
    """An old command, with the files that it names, on its way. said: word of today -> (flag that said it, value)."""

    context: MigrationContext
    section: str = ""
    said: dict[str, tuple[str, Any]] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[TongwenError] = field(default_factory=list)

    def take(self, program: OldProgram, flags: Iterable[tuple[str, Any]], place: str, inside: str = "") -> None:
        """Read the flags of a program. place: where they stand, for messages; inside: the file that a flag has named, whose
        keys these are."""
        first = len(self.verdicts)
        given = self._once(flags, place)
        for name, value in given.items():
            rule = self._rule_of(program, name, place)
            if rule is None:
                continue
            reason = _why_not(rule, given)
            if reason:
                self.verdicts.append(Verdict(name, value, "dropped", why=reason))
            else:
                self._apply(rule, name, value, place)
        for verdict in self.verdicts[first:] if inside else ():
            verdict.flag = f"{inside}:{verdict.flag}"
        for name, value in program.defaults.items():
            if name not in given and not _why_not(program.flags[name], given):
                self._apply(program.flags[name], name, value, place, own=False)
        for word, value in program.always.items():
            self.say(word, "", value, place)

    def say(self, word: str, flag: str, value: Any, place: str) -> None:
        """Set a word of today. What a flag says goes before what a program does by itself; two flags must agree."""
        before, old = self.said.get(word, ("", value))
        if flag and before and old != value:
            self.wrong(
                place,
                _("{before} and {flag} contradict each other: `{word}` would be {old!r} and {value!r}").format(
                    before=before, flag=flag, word=word, old=old, value=value
                ),
                _("keep one of {before}, {flag}").format(before=before, flag=flag),
            )
        if flag or word not in self.said:
            self.said[word] = (flag, value)

    def wrong(self, place: str, rule: str, remedy: str = "") -> None:
        self.problems.append(RecipeError(rule, place=place, remedy=remedy))

    def _once(self, flags: Iterable[tuple[str, Any]], place: str) -> dict[str, Any]:
        given: dict[str, Any] = {}
        for name, value in flags:
            if name in given and given[name] != value:
                self.wrong(
                    place,
                    _("{name} is given twice: {given!r} and {value!r}").format(
                        name=name, given=given[name], value=value
                    ),
                    _("keep one"),
                )
            given[name] = value
        return given

    def _rule_of(self, program: OldProgram, name: str, place: str) -> FlagRule | None:
        starts = (rule for start, rule in program.prefixes.items() if name == start or name.startswith(f"{start}."))
        rule = program.flags.get(name) or next(starts, None) or (_trainers_own(name) if program.trains else None)
        if rule is None:
            near = difflib.get_close_matches(name, [*program.flags, *(OWNED if program.trains else ())], 3)
            self.wrong(
                place,
                _("{project} has no flag {name!r} here").format(project=program.project, name=name),
                _("did you mean ") + " / ".join(near) if near else _("leave it out"),
            )
        return rule

    def _apply(self, rule: FlagRule, name: str, value: Any, place: str, *, own: bool = True) -> None:
        """own: the flag was given, and not only taken for granted by its program."""
        try:
            found = READERS[rule.read](self.context, name, value)
            if rule.words and not isinstance(found, RemovedFlag):
                found = _worded(rule, found)
        except ValueError as error:
            self.wrong(place, f"{name}: {error}", _("write the value explicitly"))
            return
        to = rule.to.replace("@", self.section)
        why = found.why if isinstance(found, (CorrectedValue, RemovedFlag)) else ""
        new = found.value if isinstance(found, CorrectedValue) else found
        gone = isinstance(found, RemovedFlag) or bool(rule.dropped and not (to or rule.sets))
        if own:
            self.verdicts.append(self._verdict(rule, name, value, to, gone, why or spoken(rule.mended)))
        if gone:
            return
        if to and new is not None:
            self.say(to, name if own else "", new, place)
        for word, constant in rule.sets.items():
            if new:
                self.say(word, name, constant, place)

    def _verdict(self, rule: FlagRule, name: str, value: Any, to: str, gone: bool, why: str) -> Verdict:
        if gone:
            return Verdict(name, value, "dropped", why=spoken(rule.dropped) if rule.dropped else why)
        if rule.read == "file":
            to = _("its own keys, above")
        same = to.split(".")[-1].lstrip("-").replace("-", "_") == name.split(".")[-1]
        same = same or rule.read == "file" or not (to or rule.sets)
        verdict = "mended" if why else "kept" if same else "renamed"
        return Verdict(name, value, verdict, to or ", ".join(rule.sets), why)


def _why_not(rule: FlagRule, given: dict[str, Any]) -> str:
    """Why a flag says nothing beside the others; empty when it does."""
    for other, why in rule.unless.items():
        if other in given and str(given[other]).lower() not in ("false", "-1", "0"):  # max_steps: -1 is as good as none
            return spoken(why)
    return next((spoken(why) for other, why in rule.needs.items() if other not in given), "")


def _worded(rule: FlagRule, found: Any) -> Any:
    """The word of today for an old one. Raises ValueError for a word that the program did not have."""
    words = {str(old).lower(): new for old, new in rule.words.items()}
    old = str(found.value if isinstance(found, CorrectedValue) else found).lower()
    if old not in words:
        raise ValueError(_("{old!r} is not one of: {words}").format(old=old, words=_(", ").join(words)))
    if words[old] is None:
        return RemovedFlag(_("this is the default"))
    return CorrectedValue(words[old], found.why) if isinstance(found, CorrectedValue) else words[old]


def _trainers_own(name: str) -> FlagRule | None:
    """A field of TrainingArguments that no table names."""
    if OLD.get(name):
        return FlagRule(to=f"@.{OLD[name]}", read="scalar")
    if name in OLD:
        return FlagRule(read="scalar", dropped=OLD_REASONS.get(name, N_("it has no effect any more")))
    if name in OWNED:
        return FlagRule(read="scalar", dropped=_("in a recipe: {owned}").format(owned=OWNED[name]))
    return FlagRule(to=f"@.trainer.{name}", read="scalar") if name in training_arguments() else None
