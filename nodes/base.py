"""What all nodes of the pack share: the same functions check their inputs before a prompt is queued and again before a
node runs, and whatever goes wrong in a run becomes a sentence.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any, ClassVar

from comfy_api.latest import io

from ..choices.errors import InputError, NodeError
from .values import LINK, as_plain, check_values, name_unknown

log = logging.getLogger("ComfyUI-PSA")


class PSANode(io.ComfyNode):
    """A node of the pack; it has `run` where other nodes have `execute`.

    Its schema accepts all inputs. ComfyUI would silently drop an input whose name the node does not have; this way a
    misspelt or removed input can be named.

    Attributes:
        rules: functions that raise InputError. The parameters of each are inputs of the node (or `NAME_given`: whether
            the input NAME is there at all). A rule is called once all of them are known: before the run, unless one of
            them comes over a link.
        early_rules: the same, for things that the node's own work checks when it runs; called only before a prompt is
            queued.
        told: kinds of error whose message is a sentence for the user -> the input that they are about.
    """

    rules: ClassVar[tuple[Callable[..., object], ...]] = ()
    early_rules: ClassVar[tuple[Callable[..., object], ...]] = ()
    told: ClassVar[dict[type[Exception], str]] = {}

    @classmethod
    def run(cls, *args: Any, **inputs: Any) -> io.NodeOutput:
        """The node's work, with inputs that have passed."""
        raise NotImplementedError

    @classmethod
    def validate_inputs(cls, /, **inputs: Any) -> bool | str:
        """ComfyUI calls this before it queues a prompt: True, or the sentence that the node itself would end with.

        An input that comes over a link arrives as None and is not checked.
        """
        try:
            cls.judge({name: LINK if value is None else value for name, value in inputs.items()}, early=True)
        except InputError as error:
            return str(error)
        except Exception:  # our own fault; the run will end with it, and then the log has the traceback
            log.debug("PSA: inputs could not be judged", exc_info=True)
        return True

    @classmethod
    def execute(cls, /, **inputs: Any) -> io.NodeOutput:
        """`run`, after the inputs were checked; an error that a user could not read becomes one that they can.

        Inputs that the node does not have are logged and ignored: they never stop a run.
        """
        schema = cls.define_schema()
        specs = {spec.id: spec for spec in schema.inputs}
        for line in name_unknown(schema.display_name, inputs, specs):
            log.warning("PSA: %s", line)
        inputs = {name: as_plain(value) for name, value in inputs.items() if name in specs}
        inputs = {name: value for name, value in inputs.items() if value is not None or not specs[name].optional}
        try:
            cls.judge(inputs)
            return cls.run(**inputs)
        except NodeError:
            raise
        except Exception as error:
            if _is_comfyuis(error):
                raise
            node = schema.display_name
            for kind, field in cls.told.items():
                if isinstance(error, kind):
                    allowed = f"what works here; {error}"
                    do = f"mend that and run again, or change {field}"
                    raise InputError(field, inputs.get(field), allowed, node, do=do) from error
            raise unexpected(node, inputs, error) from error  # the log shows both, with their tracebacks

    @classmethod
    def judge(cls, inputs: dict[str, Any], early: bool = False) -> None:
        """Raise InputError for inputs that are wrong, alone or together; `LINK` stands for an unknown one.

        early: whether the node does not run yet, so that `early_rules` are called too.
        """
        schema = cls.define_schema()
        rules = cls.rules + cls.early_rules
        alone = {judged[0] for rule in rules if len(judged := _required(rule)) == 1}
        check_values(schema.display_name, schema.inputs, inputs, alone)
        # Inputs that an old workflow does not have yet get their default.
        defaults = {spec.id: getattr(spec, "default", None) for spec in schema.inputs if spec.optional}
        for rule in rules if early else cls.rules:
            wanted = _arguments(rule, defaults | inputs)
            if wanted is not None:
                rule(**wanted)


def _required(rule: Callable[..., object]) -> list[str]:
    """The inputs without which a rule has nothing to check."""
    parameters = inspect.signature(rule).parameters.values()
    return [parameter.name for parameter in parameters if parameter.default is parameter.empty]


def _arguments(rule: Callable[..., object], inputs: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments for a rule, or None if one of the inputs that it checks is not known."""
    found: dict[str, Any] = {}
    for name, parameter in inspect.signature(rule).parameters.items():
        if name.endswith("_given"):
            found[name] = inputs.get(name.removesuffix("_given")) is not None
        elif inputs.get(name) is LINK or (name not in inputs and parameter.default is parameter.empty):
            return None
        elif name in inputs:
            found[name] = inputs[name]
    return found


def _is_comfyuis(error: Exception) -> bool:
    """Whether ComfyUI itself handles an error: an interrupt, or no memory left."""
    import comfy.model_management

    return isinstance(error, comfy.model_management.InterruptProcessingException | MemoryError) or bool(
        comfy.model_management.is_oom(error)
    )


def unexpected(node: str, inputs: dict[str, Any], error: Exception) -> NodeError:
    """The sentence for an error that nobody foresaw: about the input that the error mentions, if it mentions one."""
    text = f"{error} {getattr(error, 'filename', '')}"
    about = [name for name, value in inputs.items() if isinstance(value, str) and len(value) > 2 and value in text]
    reason = error.strerror if isinstance(error, OSError) and error.strerror else "an error stopped the node"
    do = "try other inputs; where that does not help, report it with the error in ComfyUI's log"
    about = about or (list(inputs) if len(inputs) == 1 else [])
    if about:
        return InputError(about[0], inputs[about[0]], f"a value that the node can use; {reason}", node, do=do)
    return NodeError(f"{node}: {reason}", do=do)
