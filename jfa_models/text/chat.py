"""Chat templates: Jinja in Hugging Face's dialect."""

import datetime
import functools
import json
from typing import Any

import jinja2
import jinja2.sandbox


def render(template: str, **values: Any) -> str:
    """Renders a template with values such as `messages` and `add_generation_prompt`.

    Raises:
      ValueError: the template refuses the values; the message includes its own reason.
    """
    try:
        return _compile(template).render(**values)
    except jinja2.TemplateError as error:
        raise ValueError(f"the model's chat template refuses these messages: {error}") from error


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    # templates come from checkpoints, so they run in a sandbox
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    # Jinja's own filter escapes for HTML, which no model was trained on.
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
