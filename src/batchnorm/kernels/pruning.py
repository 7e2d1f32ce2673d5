"""Take out of a loop, before Numba types it, the branches that its form never takes.

Numba prunes branches whose condition is a constant, but it learns too late what ``form.WEIGHTED`` is: while it types.
Until then both sides, and every loop that either calls, would be typed and lowered, for LLVM to throw half of it away.
"""

from __future__ import annotations

from typing import Any

from numba.core import ir, types
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import FunctionPass, register_pass
from numba.core.ir_utils import get_definition, guard
from numba.core.untyped_passes import InlineInlinables, RewriteSemanticConstants

__all__ = ["Pruning"]


@register_pass(mutates_CFG=False, analysis_only=False)
class _FormConstants(FunctionPass):
    """Put True or False for ``form.WEIGHTED`` and the like, where form is an argument that is a module."""

    _name = "constants_of_the_form"

    def __init__(self) -> None:
        FunctionPass.__init__(self)

    def run_pass(self, state: Any) -> bool:
        changed = False
        for block in state.func_ir.blocks.values():
            for assign in block.find_insts(ir.Assign):
                value = _constant(state, assign.value)
                if value is not None:
                    assign.value = ir.Const(value, assign.loc)
                    state.func_ir._definitions[assign.target.name] = [assign.value]
                    changed = True
        return changed


@register_pass(mutates_CFG=False, analysis_only=False)
class _InlinedConstants(_FormConstants):
    """The same for what was inlined; Numba runs no pass twice."""

    _name = "constants_of_the_form_in_what_was_inlined"


def _constant(state: Any, value: Any) -> bool | None:
    """What a flag of the form is; None for anything else."""
    if not (isinstance(value, ir.Expr) and value.op == "getattr"):
        return None
    source = guard(get_definition, state.func_ir, value.value)
    if not isinstance(source, ir.Arg) or not isinstance(state.args[source.index], types.Module):
        return None
    found = getattr(state.args[source.index].pymod, value.attr, None)
    return found if isinstance(found, bool) else None


class Pruning(CompilerBase):
    """Numba's compiler with these passes, each before one that prunes."""

    def define_pipelines(self) -> list[Any]:
        """List the one way to compile."""
        passes = DefaultPassBuilder.define_nopython_pipeline(self.state)
        passes.add_pass_after(_FormConstants, RewriteSemanticConstants)
        passes.add_pass_after(_InlinedConstants, InlineInlinables)
        passes.finalize()
        return [passes]
