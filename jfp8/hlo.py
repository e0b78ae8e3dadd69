"""Finds the matrix multiplications of a program: of optimised HLO, and of StableHLO before XLA."""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters.mlir import make_ir_context

_CUBLAS_KINDS = {
    "__cublas$lt$matmul$f8": "cublaslt_fp8",
    "__cublas$lt$matmul": "cublaslt",
    "__cublas$gemm": "cublas",
}
_MOSAIC_TARGET = "mosaic_gpu"  # the beginning of it
_MOSAIC_KERNEL = re.compile(r"(?:^|/)fp8_matmul/")  # in the op_name of a call of the kernel
_MLIR_INTEGER = {"i1": "pred", "i8": "s8", "i32": "s32", "ui8": "u8"}


@dataclasses.dataclass(frozen=True, slots=True)
class Gemm:
    """One matrix multiplication of a program: `batch` times [m, k] . [k, n]."""

    kind: str
    """cublaslt_fp8, cublaslt, cublas (library calls), mosaic_fp8 (`pallas_kernels.fp8_matmul`),
    triton (a fusion), or dot."""
    batch: int
    m: int
    n: int
    k: int
    lhs_dtype: str
    rhs_dtype: str
    out_dtype: str
    op_name: str
    """Where the user's program asks for it, such as jit(step)/jvp(fp8_dot/fwd)/dot_general."""
    executions: int = 1
    """How often one run of the program runs it: the product of the trip counts of its loops."""
    executions_known: bool = True
    """False if it is in a loop of unknown length; `executions` then counts one pass of that."""

    @property
    def is_fp8(self) -> bool:
        """Whether both operands are 8-bit floats."""
        return self.lhs_dtype.startswith("f8") and self.rhs_dtype.startswith("f8")

    @property
    def flops(self) -> int:
        """Multiplications and additions of all its executions."""
        return 2 * self.batch * self.m * self.n * self.k * self.executions


@dataclasses.dataclass(frozen=True, slots=True)
class _Type:
    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class _Dims:
    lhs_contract: Sequence[int]
    rhs_contract: Sequence[int]
    lhs_batch: Sequence[int]
    rhs_batch: Sequence[int]

    def sizes(self, lhs: _Type, rhs: _Type) -> tuple[int, int, int, int]:
        """Batch, m, n and k."""
        batch = math.prod(lhs.shape[d] for d in self.lhs_batch)
        k = math.prod(lhs.shape[d] for d in self.lhs_contract)
        m, n = (math.prod(x.shape) // max(batch * k, 1) for x in (lhs, rhs))
        return batch, m, n, k


# Of [M, K] and [N, K], as `pallas_kernels.fp8_matmul` takes its operands.
_MOSAIC_DIMS = _Dims((1,), (1,), (), ())


# --------------------------------------------------------------------------- optimised HLO text

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-$]+) = ")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLEES = re.compile(
    r"(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
    r"|(?:branch_computations|called_computations)=\{([^}]*)\}"
)
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')


@dataclasses.dataclass(frozen=True, slots=True)
class _Instruction:
    name: str
    type: _Type
    opcode: str
    operands: list[str]
    attributes: str


def hlo_gemms(text: str) -> list[Gemm]:
    """The GEMMs that one run of a compiled program runs, from its HLO text.

    Args:
      text: `jax.stages.Compiled.as_text()`.

    Returns: one `Gemm` for each GEMM instruction that is reachable from the entry computation and
      each chain of calls that leads to it. All branches of a conditional count as taken.

    Raises:
      ValueError: if `text` is not the text of an HLO module.
    """
    computations, entry = _parse_hlo(text)
    if entry is None:
        raise ValueError("the text has no ENTRY computation; it must be that of an HLO module")
    return list(_visit(computations, entry, 1, True, "dot"))


def _parse_hlo(text: str) -> tuple[dict[str, list[_Instruction]], str | None]:
    computations: dict[str, list[_Instruction]] = {}
    entry, current = None, None
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            current.append(_parse_instruction(match[1], line[match.end() :]))
    return computations, entry


def _parse_instruction(name: str, text: str) -> _Instruction:
    type_end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    shape = _SHAPE.search(text[:type_end])  # of a tuple: of its first element, the GEMM's result
    type_ = _Type(shape[1], _integers(shape[2])) if shape else _Type("", ())
    opcode_end = text.index("(", type_end)
    operands_end = _closing(text, opcode_end)
    return _Instruction(
        name=name,
        type=type_,
        opcode=text[type_end:opcode_end].strip(),
        operands=re.findall(r"%([\w.\-$]+)", text[opcode_end:operands_end]),
        attributes=text[operands_end:],
    )


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"unbalanced parentheses in the HLO line {text[:120]!r}")


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(x) for x in re.findall(r"\d+", text))


def _visit(
    computations: dict[str, list[_Instruction]], name: str, executions: int, known: bool, kind: str
) -> Iterator[Gemm]:
    types = {instruction.name: instruction.type for instruction in computations[name]}
    for instruction in computations[name]:
        if gemm := _hlo_gemm(instruction, types, kind):
            yield dataclasses.replace(gemm, executions=executions, executions_known=known)
        for role, callee in _callees(instruction.attributes):
            if callee not in computations:
                continue
            trips, trips_known = 1, True
            if instruction.opcode == "while" and role == "body":
                match = _TRIP_COUNT.search(instruction.attributes)
                trips, trips_known = (int(match[1]), True) if match else (1, False)
            is_triton = '"kind":"__triton' in instruction.attributes
            yield from _visit(
                computations,
                callee,
                executions * trips,
                known and trips_known,
                "triton" if is_triton else kind,
            )


def _callees(attributes: str) -> Iterator[tuple[str, str]]:
    for role, single, several in _CALLEES.findall(attributes):
        for callee in [single] if single else re.findall(r"[\w.\-]+", several):
            yield role, callee


def _hlo_gemm(instruction: _Instruction, types: dict[str, _Type], kind: str) -> Gemm | None:
    op_name = _OP_NAME.search(instruction.attributes)
    name = op_name[1] if op_name else ""
    if instruction.opcode == "custom-call":
        target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
        kind = _call_kind(target[1], name) if target else ""
        pattern = r'"%s_%s_dimensions":\[([^\]]*)\]'
    elif instruction.opcode == "dot":
        pattern = r"\b%s_%s_dims=\{([^}]*)\}"
    else:
        return None
    if not kind:
        return None

    def dimensions(side: str, role: str) -> tuple[int, ...]:
        match = re.search(pattern % (side, role), instruction.attributes)
        return _integers(match[1]) if match else ()

    lhs, rhs = (types[operand] for operand in instruction.operands[:2])
    dims = (
        _MOSAIC_DIMS
        if kind == "mosaic_fp8"
        else _Dims(
            dimensions("lhs", "contracting"),
            dimensions("rhs", "contracting"),
            dimensions("lhs", "batch"),
            dimensions("rhs", "batch"),
        )
    )
    batch, m, n, k = dims.sizes(lhs, rhs)
    return Gemm(
        kind=kind,
        batch=batch,
        m=m,
        n=n,
        k=k,
        lhs_dtype=lhs.dtype,
        rhs_dtype=rhs.dtype,
        out_dtype=instruction.type.dtype,
        op_name=name,
    )


def _call_kind(target: str, op_name: str) -> str:
    """The kind of GEMM that a custom call is, or "" for none."""
    if target.startswith(_MOSAIC_TARGET) and _MOSAIC_KERNEL.search(op_name):
        return "mosaic_fp8"
    return _CUBLAS_KINDS.get(target, "")


# ------------------------------------------------------------------------------------ StableHLO


def stablehlo_gemms(module: ir.Module | str) -> list[Gemm]:
    """The GEMMs that a lowered program asks for, before XLA optimises it.

    Args:
      module: `jax.stages.Lowered.compiler_ir()`, or StableHLO text (names of the operations are
        known only with `as_text(debug_info=True)`).

    Returns: as `hlo_gemms`; every kind is "dot" or "mosaic_fp8".

    Raises:
      ValueError: if `module` is text that is not StableHLO with a public main function.
    """
    if isinstance(module, str):
        with make_ir_context():
            try:
                module = ir.Module.parse(module)
            except ir.MLIRError as error:
                raise ValueError(f"the text is not StableHLO: {error}") from error
            return stablehlo_gemms(module)
    functions = {
        _unquoted(op.attributes["sym_name"]): op.operation
        for op in module.body.operations
        if op.operation.name == "func.func"
    }
    if "main" not in functions:
        raise ValueError(f"the module must have a function main (it has {sorted(functions)})")
    return list(_walk(functions["main"], functions, 1, True, ""))


def _unquoted(attribute: ir.Attribute) -> str:
    return str(attribute).strip('@"')


def _walk(
    parent: ir.Operation,
    functions: dict[str, ir.Operation],
    executions: int,
    known: bool,
    caller: str,
) -> Iterator[Gemm]:
    for i, region in enumerate(parent.regions):
        trips, trips_known = 1, True
        if parent.name == "stablehlo.while" and i == 1:
            count = _trip_count(parent)
            trips, trips_known = (1, False) if count is None else (count, True)
        inner = (executions * trips, known and trips_known)
        for operation in (op.operation for block in region.blocks for op in block.operations):
            if gemm := _stablehlo_gemm(operation, caller):
                yield dataclasses.replace(gemm, executions=inner[0], executions_known=inner[1])
            elif operation.name == "func.call":
                callee = functions[_unquoted(operation.attributes["callee"])]
                yield from _walk(callee, functions, *inner, _full_name(operation, caller))
            else:
                yield from _walk(operation, functions, *inner, caller)


def _trip_count(loop: ir.Operation) -> int | None:
    """Of a loop as JAX's scan and fori_loop write it: counts from a constant up to a constant."""
    condition = [op.operation for op in loop.regions[0].blocks[0].operations]
    compare = condition[-1].operands[0].owner
    if not isinstance(compare, ir.Operation | ir.OpView):
        return None
    compare = compare.operation
    if compare.name != "stablehlo.compare" or "LT" not in str(
        compare.attributes["comparison_direction"]
    ):
        return None
    counter, limit = compare.operands
    if not isinstance(counter.owner, ir.Block):
        return None
    start = loop.operands[ir.BlockArgument(counter).arg_number]
    first, last = _constant(start), _constant(limit)
    return None if first is None or last is None else max(last - first, 0)


def _constant(value: ir.Value) -> int | None:
    owner = value.owner
    if isinstance(owner, ir.Block) or owner.operation.name != "stablehlo.constant":
        return None
    match = re.match(r"dense<(-?\d+)>", str(owner.operation.attributes["value"]))
    return int(match[1]) if match else None


def _full_name(operation: ir.Operation, caller: str) -> str:
    """Its name; a function of its own, such as a jitted one, names what is in it from scratch."""
    match = re.match(r'loc\("([^"]*)"', str(operation.location))
    name = match[1] if match and not match[1].startswith("-") else ""
    is_relative = bool(name and caller) and not name.startswith("jit(")
    return f"{caller}/{name}" if is_relative else name or caller


def _stablehlo_gemm(operation: ir.Operation, caller: str) -> Gemm | None:
    name = _full_name(operation, caller)
    if operation.name == "stablehlo.dot_general":
        numbers = stablehlo.DotDimensionNumbers(operation.attributes["dot_dimension_numbers"])
        kind = "dot"
        dims = _Dims(
            numbers.lhs_contracting_dimensions,
            numbers.rhs_contracting_dimensions,
            numbers.lhs_batching_dimensions,
            numbers.rhs_batching_dimensions,
        )
    elif operation.name == "stablehlo.custom_call":
        kind = _call_kind(_unquoted(operation.attributes["call_target_name"]), name)
        dims = _MOSAIC_DIMS
    else:
        return None
    if not kind:
        return None
    lhs, rhs = (_mlir_type(operand) for operand in list(operation.operands)[:2])
    batch, m, n, k = dims.sizes(lhs, rhs)
    return Gemm(
        kind=kind,
        batch=batch,
        m=m,
        n=n,
        k=k,
        lhs_dtype=lhs.dtype,
        rhs_dtype=rhs.dtype,
        out_dtype=_mlir_type(operation.results[0]).dtype,
        op_name=name,
    )


def _mlir_type(value: ir.Value) -> _Type:
    type_ = ir.RankedTensorType(value.type)
    dtype = str(type_.element_type).lower()
    return _Type(_MLIR_INTEGER.get(dtype, dtype), tuple(type_.shape))
