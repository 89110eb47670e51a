"""Writes docs/settings.md from the three services' settings classes: `python -m ops.settings_doc`.

Station: beside the data's way. It invents no word: every meaning is the field's own docstring.
"""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import SecretStr
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings

PAGE = Path(__file__).parent.parent / "docs" / "settings.md"

_HEAD = """# Settings

Made by `python -m ops.settings_doc` from the settings classes; change the docstring there.

A service is set by environment variables alone. It refuses to start with exit code 78 when a value is out of range or a
`STREAMTOWER_*` variable is none of its own, and then lists every problem at once. `--help` of each service lists the
same.
"""

_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def settings_classes() -> dict[str, type[BaseSettings]]:
    """Service → its settings class."""
    from retriever.settings import RetrieverSettings
    from streams.settings import StreamsSettings
    from trainer.settings import TrainerSettings

    return {"streams": StreamsSettings, "trainer": TrainerSettings, "retriever": RetrieverSettings}


def _type(annotation: Any) -> str:
    if annotation is SecretStr:
        return "secret text"
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(_type(part) for part in get_args(annotation) if part is not types.NoneType)
    if get_origin(annotation) is not None:
        return "JSON"
    return {str: "text", Path: "path", int: "integer", float: "number", bool: "true or false"}.get(annotation, "JSON")


def _range(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {value:,}" if isinstance(value, int) else f"{sign} {value:g}"
        for name, sign in _BOUNDS.items()
        for rule in field.metadata
        if (value := getattr(rule, name, None)) is not None
    ]
    return ", ".join(bounds)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**must be set**"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is None or value == "":
        return "none"
    if isinstance(value, str | Path | bool | int | float):
        return f"`{value}`"
    return f"`{json.dumps(value, default=str)}`"


def render() -> str:
    """The whole page."""
    parts = [_HEAD]
    for service, settings_class in settings_classes().items():
        prefix = str(settings_class.model_config["env_prefix"]).upper()
        parts.append(f"\n## {service}\n\n| variable | value | default | meaning |\n|---|---|---|---|\n")
        for name, field in settings_class.model_fields.items():
            values = ", ".join(part for part in (_type(field.annotation), _range(field)) if part)
            text = " ".join((field.description or "").split()).replace("|", "\\|")
            parts.append(f"| `{prefix}{name.upper()}` | {values} | {_default(field)} | {text} |\n")
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(render())
