"""The settings of a request as options of a command.

@click.command()
@setting_options
def run(**options): Request("a fist", **given(options))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from ..settings import IMAGES_PER_PROMPT, SETTINGS, Setting, option


class AliasedOption(click.Option):
    """An option whose further names are accepted, and absent from the help."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        names, self.opts = self.opts, self.opts[:1]
        try:
            return super().get_help_record(ctx)
        finally:
            self.opts = names


def settings_without(*names: str) -> Callable[[Any], Any]:
    """Decorates a command with an option for each setting but `names`, and for the number of pictures of a prompt."""

    def decorate(command: Any) -> Any:
        named = {"images_per_prompt": IMAGES_PER_PROMPT, **SETTINGS}
        for name, setting in reversed(named.items()):  # the decorator that comes last is the first option
            if name in names:
                continue
            default: dict[str, Any] = {"default": 1, "show_default": True} if setting is IMAGES_PER_PROMPT else {}
            if setting.kind is bool:
                default = {"is_flag": True, "default": None}  # None: not typed
            said = "" if default or setting.default == "" else f"  [default: {setting.default_said}]"
            command = click.option(
                *option(name, setting),
                name,
                cls=AliasedOption,
                type=_type(setting),
                metavar="START STOP" if setting.kind is tuple else None,
                help=setting.help + said,
                **default,
            )(command)
        return command

    return decorate


setting_options = settings_without()


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The settings that were typed, for `Request`; without the seed, which repeated prompts count up."""
    return {name: options[name] for name in SETTINGS if name != "seed" and options.get(name) is not None}


def _type(setting: Setting) -> Any:
    if setting.kind is bool:
        return click.BOOL
    if setting.kind is tuple:
        return (click.FloatRange(0, 1), click.FloatRange(0, 1))
    if setting.kind is int:
        return click.IntRange(int(setting.least), int(setting.most))
    if setting.kind is float:
        return click.FloatRange(setting.least, setting.most)
    return click.Choice(list(setting.choices)) if setting.choices else click.STRING
