"""Turn flags with their values into keys of a recipe, or options of a command; each flag gets one verdict.

The tables name the new key of a flag, and a reader converts its value. A flag with two different values, without its value,
or unknown to the program is a problem; all problems are raised together.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tongwen.core.errors import RecipeError, TongwenError
from tongwen.core.i18n import N_, _
from tongwen.core.nearest_names import did_you_mean, nearest_names
from tongwen.migrate.flag_values import READERS, CorrectedValue, MigrationContext, RemovedFlag
from tongwen.migrate.tables import FlagRule, OldProgram, translate
from tongwen.recipe.aliases import NEEDLESS, OLD, OLD_REASONS, OWNED, training_arguments


@dataclass
class Verdict:
    """The result for one flag. verdict: kept | renamed | mended | dropped; becomes: the new key; why: the reason."""

    flag: str
    value: Any
    verdict: str
    becomes: str = ""
    why: str = ""


@dataclass
class FlagReader:
    """Reads an old command and the files that it names. settings: new key -> (flag that set it, value)."""

    context: MigrationContext
    section: str = ""
    settings: dict[str, tuple[str, Any]] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[TongwenError] = field(default_factory=list)

    def read_flags(self, program: OldProgram, flags: Iterable[tuple[str, Any]], place: str, inside: str = "") -> None:
        """Read the flags of a program. place: their origin, for messages; inside: the file that contains them, if a flag
        names one."""
        first = len(self.verdicts)
        values = self._once(flags, place)
        for name, value in values.items():
            rule = self._rule_of(program, name, place)
            if rule is None:
                continue
            reason = _drop_reason(rule, values)
            if reason:
                self.verdicts.append(Verdict(name, value, "dropped", why=reason))
            else:
                self._apply(rule, name, value, place)
        for verdict in self.verdicts[first:] if inside else ():
            verdict.flag = f"{inside}:{verdict.flag}"
        for name, value in program.defaults.items():
            if name not in values and not _drop_reason(program.flags[name], values):
                self._apply(program.flags[name], name, value, place, explicit=False)
        for key, value in program.always.items():
            self.set_value(key, "", value, place)

    def set_value(self, key: str, flag: str, value: Any, place: str) -> None:
        """Set a new key. A flag overrides the program's own default; two flags must agree."""
        before, old = self.settings.get(key, ("", value))
        if flag and before and old != value:
            self.add_problem(
                place,
                _("{before} and {flag} contradict each other: `{word}` would be {old!r} and {value!r}").format(
                    before=before, flag=flag, word=key, old=old, value=value
                ),
                _("keep one of {before}, {flag}").format(before=before, flag=flag),
            )
        if flag or key not in self.settings:
            self.settings[key] = (flag, value)

    def add_problem(self, place: str, rule: str, remedy: str = "") -> None:
        self.problems.append(RecipeError(rule, place=place, remedy=remedy))

    def _once(self, flags: Iterable[tuple[str, Any]], place: str) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, value in flags:
            if name in values and values[name] != value:
                self.add_problem(
                    place,
                    _("{name} is given twice: {given!r} and {value!r}").format(
                        name=name, given=values[name], value=value
                    ),
                    _("keep one"),
                )
            values[name] = value
        return values

    def _rule_of(self, program: OldProgram, name: str, place: str) -> FlagRule | None:
        prefixed = (rule for start, rule in program.prefixes.items() if name == start or name.startswith(f"{start}."))
        rule = (
            program.flags.get(name)
            or next(prefixed, None)
            or (_training_argument_rule(name) if program.trains else None)
        )
        if rule is None:
            near = nearest_names(name, [*program.flags, *((OWNED | NEEDLESS) if program.trains else ())])
            self.add_problem(
                place,
                _("{project} has no flag {name!r} here").format(project=program.project, name=name),
                did_you_mean(near) or _("leave it out"),
            )
        return rule

    def _apply(self, rule: FlagRule, name: str, value: Any, place: str, *, explicit: bool = True) -> None:
        """Apply one flag. explicit: the user gave it; it is not a default of the program."""
        try:
            found = READERS[rule.read](self.context, name, value)
            if rule.words and not isinstance(found, RemovedFlag):
                found = _map_value(rule, found)
        except ValueError as error:
            self.add_problem(place, f"{name}: {error}", _("write the value explicitly"))
            return
        target = rule.to.replace("@", self.section)
        why = found.why if isinstance(found, (CorrectedValue, RemovedFlag)) else ""
        new = found.value if isinstance(found, CorrectedValue) else found
        dropped = isinstance(found, RemovedFlag) or bool(rule.dropped and not (target or rule.sets))
        if explicit:
            self.verdicts.append(self._verdict(rule, name, value, target, dropped, why or translate(rule.mended)))
        if dropped:
            return
        if target and new is not None:
            self.set_value(target, name if explicit else "", new, place)
        for key, constant in rule.sets.items():
            if new:
                self.set_value(key, name, constant, place)

    def _verdict(self, rule: FlagRule, name: str, value: Any, target: str, dropped: bool, why: str) -> Verdict:
        if dropped:
            return Verdict(name, value, "dropped", why=translate(rule.dropped) if rule.dropped else why)
        if rule.read == "file":
            target = _("its own keys, above")
        unchanged = target.split(".")[-1].lstrip("-").replace("-", "_") == name.split(".")[-1]
        unchanged = unchanged or rule.read == "file" or not (target or rule.sets)
        verdict = "mended" if why else "kept" if unchanged else "renamed"
        return Verdict(name, value, verdict, target or ", ".join(rule.sets), why)


def _drop_reason(rule: FlagRule, values: dict[str, Any]) -> str:
    """Return why a flag has no effect next to the others, or ""."""
    for other, why in rule.unless.items():
        # max_steps: -1 means no limit, as if the flag were absent.
        if other in values and str(values[other]).lower() not in ("false", "-1", "0"):
            return translate(why)
    return next((translate(why) for other, why in rule.needs.items() if other not in values), "")


def _map_value(rule: FlagRule, found: Any) -> Any:
    """Return the new value for an old one. Raises ValueError for a value that the program did not have."""
    mapping = {str(old).lower(): new for old, new in rule.words.items()}
    old = str(found.value if isinstance(found, CorrectedValue) else found).lower()
    if old not in mapping:
        raise ValueError(_("{old!r} is not one of: {words}").format(old=old, words=_(", ").join(mapping)))
    if mapping[old] is None:
        return RemovedFlag(_("this is the default"))
    return CorrectedValue(mapping[old], found.why) if isinstance(found, CorrectedValue) else mapping[old]


def _training_argument_rule(name: str) -> FlagRule | None:
    """Return the rule for a field of TrainingArguments that no table names."""
    if OLD.get(name):
        return FlagRule(to=f"@.{OLD[name]}", read="scalar")
    if name in OLD:
        return FlagRule(read="scalar", dropped=OLD_REASONS.get(name, N_("it has no effect any more")))
    if name in NEEDLESS:
        return FlagRule(read="scalar", dropped=NEEDLESS[name])
    if name in OWNED:
        return FlagRule(read="scalar", dropped=_("in a recipe: {owned}").format(owned=OWNED[name]))
    return FlagRule(to=f"@.trainer.{name}", read="scalar") if name in training_arguments() else None
