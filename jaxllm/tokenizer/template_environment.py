"""A Jinja environment in which no template can run away.

Inputs: template source. Output: a compiled `jinja2.Template` to be rendered under a `Budget`. Beyond Jinja's
immutable sandbox (which bounds one `range` but not two nested loops): the syntax tree is rewritten so that
each loop iteration, macro call, concatenation and container literal is charged, and only the operations in
`template_operations.py` exist. It does not know what templates are rendered with.
"""

from __future__ import annotations

from typing import Any, TypeVar

from jinja2 import DictLoader, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from jaxllm.tokenizer import template_operations as operations
from jaxllm.tokenizer.template_budget import charge, measured, paid, to_text

_Body = TypeVar("_Body", nodes.For, nodes.Macro, nodes.CallBlock)


class GenerationBlock(Extension):
    """`{% generation %}`, which training masks use; here it is its body."""

    tags = {"generation"}  # noqa: RUF012  Jinja's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Subclassing is how Jinja takes hooks; nothing here is inherited further."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[GenerationBlock, loopcontrols],
            loader=DictLoader({}),
            optimized=False,  # folding constants would run operations while compiling, outside any budget
            finalize=to_text,
        )
        self.globals = dict(operations.GLOBALS)
        self.filters = operations.allowed_filters()
        self.tick, self.measured, self.joined_text = charge, measured, _joined_text

    def bounded_template(self, source: str) -> Any:
        tree = _Bounding(self).visit(self.parse(source))
        return self.template_class.from_code(self, self.compile(tree), self.globals)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        # Jinja passes template keywords through; the underscores keep them from meeting these names.
        if __obj is charge:
            return charge(*args)
        charge(1)
        args = operations.method_call(__obj, args)
        return paid(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        operations.binary_operation(operator, left, right)
        result = super().call_binop(context, operator, left, right)
        return measured(result)

    def wrap_str_format(self, value: Any) -> Any:
        """Jinja lets `format` through with a wrapper that does not bound its widths: ours does."""
        text = getattr(value, "__self__", None)
        if isinstance(text, str) and getattr(value, "__name__", "") == "format":
            return operations.text_format(text)
        return None

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if not operations.is_allowed_method(obj, attr):
            return False
        return super().is_safe_attribute(obj, attr, value)


def _joined_text(*parts: Any) -> str:
    return "".join([to_text(part) for part in parts])


class _Bounding(NodeTransformer):
    """Puts charges into a syntax tree."""

    def __init__(self, environment: BoundedEnvironment) -> None:
        self._environment = environment

    def visit_For(self, node: nodes.For) -> nodes.For:
        return self._charge_body(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:
        return self._charge_body(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.CallBlock:
        return self._charge_body(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._call("joined_text", list(node.nodes), node.lineno)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return self._call("measured", [node], node.lineno)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return self._call("measured", [node], node.lineno)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return self._call("measured", [node], node.lineno) if node.ctx == "load" else node

    def _charge_body(self, node: _Body) -> _Body:
        self.generic_visit(node)
        constants = node.find_all((nodes.TemplateData, nodes.Const))
        chars = sum(len(c.data if isinstance(c, nodes.TemplateData) else str(c.value)) for c in constants)
        amounts: list[nodes.Expr] = [nodes.Const(1), nodes.Const(chars)]
        tick = nodes.ExprStmt(self._call("tick", amounts, node.lineno), lineno=node.lineno)
        node.body.insert(0, tick.set_environment(self._environment))
        return node

    def _call(self, name: str, args: list[nodes.Expr], lineno: int) -> nodes.Expr:
        # Through the environment, not by name: a template cannot set a variable of that name in between.
        call = nodes.Call(nodes.EnvironmentAttribute(name), args, [], None, None, lineno=lineno)
        call.set_environment(self._environment)
        return call
