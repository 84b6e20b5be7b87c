"""Finds every message that the product can show, by reading its code: log lines, reasons why something stays dense or
is not done, and errors. What a message only knows when it is shown is `…` here; what is not always part of it stands in
square brackets. No code of the product runs.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

from .alternatives import UNKNOWN, cases, either, join, perhaps, shown
from .syntax import Module, added_to, function_of, name_of, read_all, values_of

FOLDERS = ("nodes", "reports", "patching", "for_diffusers", "loading", "cogvideox", "sampling", "choices", "kernels")
LEVELS = ("info", "warning", "error", "exception", "critical", "log")
"""Methods of a log that users see; `debug` is for developers."""

PASSED_ON = {
    "cogvideox/corrections.py: variant.name, _summary(variant)": ["cogvideox/corrections.py:_summary"],
    "cogvideox/corrections.py: warning": ["cogvideox/corrections.py:float16_warning"],
    "loading/checkpoint.py: checked.path": [],
    "loading/lora.py: summary": ["loading/lora.py:_summary"],
    "loading/tensor_file.py: path, error": [],
    "nodes/base.py: line": ["nodes/values.py:name_unknown"],
    "patching/handle.py: summary(handle.report)": ["sampling/figures.py:summary", "sampling/pays.py:_why"],
    "patching/patch.py: family.advice": ["cogvideox/corrections.py:missing_corrections", "patching/generic.py"],
    "patching/patch.py: family.name, settings": ["choices/settings.py:__str__"],
    "sampling/record.py: sentence": ["sampling/findings.py"],
    "sampling/record.py: what, reason": [
        "sampling/self_attention.py",
        "sampling/correction.py",
        "choices/correction.py",
        "patching/override.py",
        "patching/layout.py",
        "for_diffusers/layout.py:_read_hunyuan_15",
        "for_diffusers/layout.py:_own_sparse_attention",
        "for_diffusers/state.py",
        "for_diffusers/attention_call.py",
        "for_diffusers/attention_backends.py",
        "for_diffusers/parallel.py:dense_reason",
        "kernels/backends.py",
        "kernels/broken.py",
    ],
}
"""A log line without words of its own -> where its sentences are written, as `file` or `file:function`. Lines that show
a path and somebody else's error have none."""
ALSO_READ = [
    "patching/family.py",
    "patching/families/",
    "cogvideox/variant.py:_checked",
    "cogvideox/variant.py:_schedule",
]
"""More places of sentences that are shown after words of another place; a folder means all functions of its files."""

LOG_ONLY = {
    "choices/settings.py:__str__",
    "cogvideox/corrections.py:_summary",
    "cogvideox/corrections.py:float16_warning",
    "loading/lora.py:_summary",
    "nodes/values.py:name_unknown",
    "sampling/figures.py:summary",
}
"""Places of sentences that ComfyUI's page does not show."""
SHOWN_TOO = [
    "choices/errors.py:of_choice",
    "choices/user_presets.py:_wrong",
    "kernels/refusal.py:shown",
    "loading/download.py:_reason",
    "loading/recognise.py",
    "loading/safetensors_header.py",
    "nodes/base.py:unexpected",
    "patching/patch.py",
    "reports/show.py:show_report",
    "sampling/position.py:size",
]
"""Places of sentences that the page shows, besides the reasons and the arguments of errors."""
FRAMES = (
    f"{UNKNOWN}, input {UNKNOWN}: {UNKNOWN} was given; allowed: {UNKNOWN}",
    f"{UNKNOWN}: {UNKNOWN} was given; allowed: {UNKNOWN}",
    f"{UNKNOWN}: {UNKNOWN} ({UNKNOWN})",
    f"{UNKNOWN}: {UNKNOWN}",
)
"""What is around the arguments of errors."""

ERRORS = {
    "InputError": ("field", "given", "allowed", "node", "do"),
    "of_choice": ("field", "given", "choices", "node"),
    "NodeError": ("told", "do"),
    "FileError": ("path", "reason", "do"),
    "ConfigError": ("field", "given", "allowed", "do"),
    "PresetError": ("told",),
    "DownloadError": ("told",),
    "_error": ("field", "given", "allowed", "do"),
    "wrong": ("node", "field", "given", "allowed", "do"),
}
"""What makes an error that is shown -> its arguments."""
NOT_SHOWN = {"NotCogVideoX", "BackendError", "KernelError"}
"""Errors that our own code catches: it puts them into other words, or shows them as a reason."""

_KNOWN_BY_CLASS = {
    "FileError": ("Files", "download it again"),
    "ConfigError": ("Settings", "change {field}"),
    "PresetError": ("Presets of your own", "mend the file, or choose another preset"),
    "DownloadError": ("PSA LoRA Download", "mend that and run again"),
}
"""Kind of error -> what it is listed under, and what to do where it does not say so itself."""
_CALLED = {
    "for_diffusers/local.py": "LocalAttention",
    "for_diffusers/parallel.py": "enable_parallelism",
    "for_diffusers/arguments.py": "apply_psa, LocalAttention",
}
"""Files of for_diffusers whose errors name another call than apply_psa."""
_LEAST_WORDS = 4
_PLACEHOLDER = re.compile(r"%[-+ 0#]*\d*(?:\.\d+)?[a-zA-Z]")


@dataclasses.dataclass(frozen=True)
class Message:
    """A message of the product.

    Attributes:
        kind: log, reason or error. file: where it is written. text: with `…` for what is only known when it is shown.
        node, field, given, allowed, do: of an error, otherwise empty; an error without a field has its sentence as
            `text`.
    """

    kind: str
    file: str
    text: str
    node: str = ""
    field: str = ""
    given: str = ""
    allowed: str = ""
    do: str = ""

    def shown(self) -> Message:
        """The message as readers see it, see `alternatives.py`."""
        return Message(*map(shown, dataclasses.astuple(self)))


class Product:
    """All modules of the product."""

    def __init__(self, root: Path) -> None:
        """root: the repository."""
        self.modules = {module.file: module for module in read_all(root, FOLDERS)}

    def messages(self) -> list[Message]:
        """Every message once, by file and place in it."""
        return list(dict.fromkeys(message.shown() for message in self._all()))

    def templates(self) -> list[str]:
        """Every sentence, and every part of an error, that ComfyUI's page can show: each of its cases alone, with `…`
        for what is only known when it is shown."""
        places = [place for place in self.places() if place not in LOG_ONLY]
        reasons = (reason for place in places for reason in self._reasons_at(place) if _is_sentence(reason.text))
        parts = (part for place in SHOWN_TOO for part in self._reasons_at(place))
        found = [one for one in (*reasons, *parts, *self._errors()) if not one.file.startswith("for_diffusers/")]
        told = [case for one in found for text in (one.text, one.given, one.allowed, one.do) for case in cases(text)]
        texts = [_completed(text) for text in told if re.search(r"[A-Za-z]{2}", text) and " " in text]
        return list(dict.fromkeys((*FRAMES, *texts)))

    def passed_on(self) -> set[str]:
        """Log lines without words of their own, as keys of `PASSED_ON`."""
        return {
            key
            for module in self.modules.values()
            for call in _log_calls(module)
            if (key := self._passes(call, module))
        }

    def error_classes(self) -> set[str]:
        """Names of the product's error classes."""
        builtin = {"Exception", "ValueError", "RuntimeError", "TypeError", "OSError"}
        classes = [node for m in self.modules.values() for node in ast.walk(m.tree) if isinstance(node, ast.ClassDef)]
        names: set[str] = set()
        while more := {c.name for c in classes if {name_of(base) for base in c.bases} & (builtin | names)} - names:
            names |= more
        return names

    def _all(self) -> Iterator[Message]:
        yield from self._logs()
        yield from self._reasons()
        yield from self._errors()

    def _logs(self) -> Iterator[Message]:
        for module in self.modules.values():
            for call in _log_calls(module):
                if not self._passes(call, module):
                    yield Message("log", module.file, self._log_text(call, module))

    def _passes(self, call: ast.Call, module: Module) -> str:
        if re.search(r"[a-z]", self._log_text(call, module)):
            return ""
        arguments = call.args[_template_at(call) + 1 :]
        return f"{module.file}: {', '.join(map(ast.unparse, arguments))}"

    def _log_text(self, call: ast.Call, module: Module) -> str:
        template, *arguments = call.args[_template_at(call) :]
        values = iter([self.text(argument, module) for argument in arguments])
        text = _PLACEHOLDER.sub(lambda _: next(values, UNKNOWN), self.text(template, module))
        return _tidy(text.removeprefix("PSA: "))

    def _reasons(self) -> Iterator[Message]:
        for place in self.places():
            yield from (message for message in self._reasons_at(place) if _is_sentence(shown(message.text)))

    def _reasons_at(self, place: str) -> Iterator[Message]:
        file, _, function = place.partition(":")
        module = self.modules[file]
        trees: list[ast.AST] = [module.tree]
        if function:
            trees = [n for n in ast.walk(module.tree) if isinstance(n, ast.FunctionDef) and n.name == function]
            if not trees:
                raise LookupError(f"{file} has no function {function}")
        for tree in trees:
            for node in _sentences(tree, module):
                yield Message("reason", file, _tidy(self.text(node, module)))

    def places(self) -> Iterator[str]:
        """Where reasons are written, as `file` or `file:function`."""
        for place in [*dict.fromkeys(place for places in PASSED_ON.values() for place in places), *ALSO_READ]:
            if place.endswith("/"):
                files = [module for module in self.modules.values() if module.file.startswith(place)]
                functions = [(m.file, node) for m in files for node in m.tree.body if isinstance(node, ast.FunctionDef)]
                yield from (f"{file}:{function.name}" for file, function in functions)
            else:
                yield place

    def _errors(self) -> Iterator[Message]:
        for module in self.modules.values():
            for call in ast.walk(module.tree):
                if isinstance(call, ast.Call) and name_of(call.func) in ERRORS:
                    message = self._error(call, module)
                    if re.search(r"[a-z]", shown(message.text + message.allowed + message.field)):
                        yield message

    def _error(self, call: ast.Call, module: Module) -> Message:
        name = name_of(call.func)
        given = dict(zip(ERRORS[name], call.args, strict=False))
        given |= {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
        words = {key: _tidy(self.text(value, module)) for key, value in given.items()}
        if name == "of_choice":
            words |= {"allowed": "an entry of its menu", "do": "choose one of those that the error names"}
        node, do = _KNOWN_BY_CLASS.get(name, ("", ""))
        if module.file.startswith("for_diffusers/") and words.get("node", UNKNOWN) == UNKNOWN:
            node = _CALLED.get(module.file, "apply_psa")
        elif module.file == "choices/levels.py":
            node = "PSA Pyramid"
        words.setdefault("do", do.format(**words))
        node = node or words.get("node", "PSA Patch")
        node = "Every node" if node == UNKNOWN else node
        text = words.get("told") or words.get("reason") or ""
        text = "" if text == UNKNOWN else text
        parts = (words.get(part, "") for part in ("field", "given", "allowed", "do"))
        return Message("error", module.file, text, node, *parts)

    def text(self, node: ast.expr, module: Module, depth: int = 0) -> str:
        """What an expression says, with `…` for what is not known."""
        if depth > 8:
            return UNKNOWN
        if isinstance(node, ast.Constant):
            return str(node.value)
        if isinstance(node, ast.JoinedStr):
            return "".join(self.text(value, module, depth + 1) for value in node.values)
        if isinstance(node, ast.FormattedValue):
            return self.text(node.value, module, depth + 1)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) and not _is_number(node.right):
            return self.text(node.left, module, depth + 1) + self.text(node.right, module, depth + 1)
        if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or):
            return either([self.text(value, module, depth + 1) for value in node.values])
        if isinstance(node, ast.IfExp):
            return either([self.text(one, module, depth + 1) for one in (node.body, node.orelse)])
        if isinstance(node, ast.Call) and _is_join(node):
            return self._joined(node, module, depth + 1)
        if isinstance(node, ast.Name):
            return self._named(node, module, depth)
        return UNKNOWN

    def _joined(self, call: ast.Call, module: Module, depth: int) -> str:
        """What `"; ".join([...])` gives; a starred part may have no items."""
        between = self.text(call.func.value, module, depth)  # type: ignore[attr-defined]
        parts = call.args[0].elts  # type: ignore[attr-defined]
        more = perhaps(between + UNKNOWN)
        return join(between, [more if isinstance(p, ast.Starred) else self.text(p, module) for p in parts])

    def _named(self, name: ast.Name, module: Module, depth: int) -> str:
        function = function_of(name, module)
        if function is not None:
            if name.id in {argument.arg for argument in ast.walk(function) if isinstance(argument, ast.arg)}:
                return UNKNOWN
            values = values_of(function, name, module)
            if values is not None:
                found = list(dict.fromkeys(self.text(value, module, depth + 1) for value in values))
                added = "".join(perhaps(self.text(value, module, depth + 1)) for value in added_to(function, name))
                if len(found) == 1 and added:
                    return found[0] + added
                return either(found)
        if name.id in module.constants:
            return self.text(module.constants[name.id], module, depth + 1)
        file, original = module.imports.get(name.id, ("", ""))
        other = self.modules.get(file)
        if other is not None and original in other.constants:
            return self.text(other.constants[original], other, depth + 1)
        return UNKNOWN


def _log_calls(module: Module) -> Iterator[ast.Call]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and _is_log(node) and name_of(node.func) in LEVELS:
            yield node


def _is_log(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Attribute) and name_of(call.func.value) in ("log", "logger", "logging")


def _template_at(call: ast.Call) -> int:
    """Which argument is the template: `log.log` has the level first."""
    return 1 if name_of(call.func) == "log" else 0


def _sentences(tree: ast.AST, module: Module) -> Iterator[ast.expr]:
    """The outermost string expressions below a node: no docstrings, log lines, errors, and none that become part of
    another string."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.Call) and (name_of(node.func) in ERRORS or _is_log(node)):
            continue
        if isinstance(node, ast.Subscript | ast.arguments | ast.arg):
            continue
        if _is_text(node):
            if not _is_part(node, module):
                yield node
            continue
        yield from _sentences(node, module)


def _is_text(node: ast.AST) -> bool:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _is_text(node.left) or _is_text(node.right)
    if isinstance(node, ast.Call) and _is_join(node):
        return True
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _is_number(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, int | float)


def _is_join(call: ast.Call) -> bool:
    """Whether it is `"; ".join([...])`."""
    function = call.func
    if not (
        isinstance(function, ast.Attribute) and function.attr == "join" and isinstance(function.value, ast.Constant)
    ):
        return False
    return len(call.args) == 1 and isinstance(call.args[0], ast.List)


def _is_part(node: ast.AST, module: Module) -> bool:
    """Whether a string is only given a name that other strings then contain."""
    parent = _around(node, module)
    if not (isinstance(parent, ast.Assign) and isinstance(parent.targets[0], ast.Name)):
        return False
    scope = function_of(node, module) or module.tree
    within = [_around(use, module) for use in ast.walk(scope) if _reads(use, parent.targets[0].id)]
    return bool(within) and all(
        isinstance(one, ast.FormattedValue | ast.BinOp) or (isinstance(one, ast.Call) and _is_log(one))
        for one in within
    )


def _around(node: ast.AST, module: Module) -> ast.AST:
    """What a value is part of, whether under a condition or not."""
    parent = module.parents[node]
    return _around(parent, module) if isinstance(parent, ast.IfExp) else parent


def _reads(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load)


def _is_sentence(text: str) -> bool:
    return " " in text and len(re.findall(r"[A-Za-z']{2,}", text)) >= _LEAST_WORDS


def _completed(text: str) -> str:
    """A text that is added to another one, with that one."""
    return _tidy(UNKNOWN + text if text.startswith(";") else text)


def _tidy(text: str) -> str:
    text = re.sub(r"\s+", " ", text).strip()
    return re.sub(rf"{UNKNOWN}(?:{UNKNOWN})+", UNKNOWN, text)
