"""How Numba compiles a loop here: branches that its form never takes are pruned first, and nothing is loaded.

Numba prunes branches whose condition is a constant, but it learns too late what ``form.WEIGHTED`` is: while it types.
Until then both sides, and every loop that either calls, would be typed and lowered, for LLVM to throw half of it away.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from numba._dynfunc import make_function
from numba.core import ir, types
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import FunctionPass, register_pass
from numba.core.ir_utils import get_definition, guard
from numba.core.typed_passes import NativeLowering
from numba.core.untyped_passes import RewriteSemanticConstants

__all__ = ["Parts", "Pipeline"]

# For closures, `with` blocks, arrays, and functions that are inlined before they are typed: the loops have none.
_NOT_NEEDED = {"inline_closure_likes", "with_lifting", "nopython_rewrites", "inline_inlinables", "inline_overloads"}


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


def _constant(state: Any, value: Any) -> bool | None:
    """What a flag of the form is; None for anything else."""
    if not (isinstance(value, ir.Expr) and value.op == "getattr"):
        return None
    source = guard(get_definition, state.func_ir, value.value)
    if not isinstance(source, ir.Arg) or not isinstance(state.args[source.index], types.Module):
        return None
    found = getattr(state.args[source.index].pymod, value.attr, None)
    return found if isinstance(found, bool) else None


class Parts(JITCodeLibrary):
    """The code of one function, neither optimized nor loaded, and what it is linked with."""

    @classmethod
    def of(cls, library: Any) -> Iterator[Any]:
        """Give the modules of a library and of all that it needs, each once."""
        seen, waiting = set(), [library]
        while waiting:
            part = waiting.pop()
            if part not in seen:
                seen.add(part)
                yield part._get_module_for_linking()
                if isinstance(part, cls):  # others have their modules within their own
                    waiting += part._linking_libraries

    def add_llvm_module(self, ll_module: Any) -> None:
        """Add code as it is."""
        self._final_module.link_in(ll_module)

    def finalize(self) -> None:
        """End here: what would follow is optimizing and loading."""
        self._finalized = True

    def _get_module_for_linking(self) -> Any:
        self._ensure_finalized()
        return self._final_module


@register_pass(mutates_CFG=True, analysis_only=False)
class _Lowering(NativeLowering):
    """Numba's, into ``Parts``, with no machine code yet."""

    _name = "lowering_without_machine_code"

    def run_pass(self, state: Any) -> bool:
        state.library = Parts(state.targetctx.codegen(), state.func_id.func_qualname)
        state.library.enable_object_caching()
        state.flags.no_compile = True
        super().run_pass(state)
        result, described = state.cr, state.cr.fndesc
        # What nobody ever calls: Numba knows callers' code by it.
        token = make_function(described.lookup_module(), described.qualname, "", 0, result.env, (state.library,))
        state.targetctx.insert_user_function(token, described, [state.library])
        state["cr"] = result._replace(cfunc=token)
        return True


class Pipeline(CompilerBase):
    """Numba's compiler with these passes, and without those that find no work here."""

    def define_pipelines(self) -> list[Any]:
        """List the one way to compile."""
        passes = DefaultPassBuilder.define_nopython_pipeline(self.state)
        passes.add_pass_after(_FormConstants, RewriteSemanticConstants)
        steps = [step for step in passes.passes if step[0].name() not in _NOT_NEEDED]
        passes.passes = [(_Lowering if step is NativeLowering else step, why) for step, why in steps]
        passes.finalize()
        return [passes]
