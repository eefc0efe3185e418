"""An ONNX graph as a torch module: the operators of a convolutional transformer, differentiable.

Each node of the graph is one call of a torch function, in the order of the file (which ONNX requires to be
topological). Constants become buffers, so `to(device, dtype)` moves and casts the network; integers, which
only compute shapes, stay on the CPU. Unknown operators and attributes are errors when the graph is built.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

CASTS = {6: torch.int32, 7: torch.int64}  # onnx.TensorProto.INT32, INT64: only shapes are cast


class Node(NamedTuple):
    """Node of a graph: one call `output = operator(*inputs, **attributes)`.

    Attributes:
        operator: name of an ONNX operator.
        inputs: names of values; a trailing optional one may be "".
        output: name of the result.
        attributes: attributes by their names in the ONNX specification.
    """

    operator: str
    inputs: Sequence[str]
    output: str
    attributes: dict[str, Any]


class OnnxGraph(nn.Module):
    """Function that a list of nodes computes.

    Args:
        nodes: nodes in an order in which the inputs of each are computed before it.
        constants: values by name.
        source: name of the graph's only input.

    Raises:
        ValueError: naming an operator or attribute that isn't supported, or a value that nothing computes.
    """

    def __init__(self, nodes: Sequence[Node], constants: dict[str, Tensor], *, source: str) -> None:
        super().__init__()
        known = {source, *constants}
        for node in nodes:
            _check_node(node, known)
            known.add(node.output)
        self._nodes, self._source = list(nodes), source
        self._last_use = {name: row for row, node in enumerate(nodes) for name in node.inputs}
        self._shapes = {name: value for name, value in constants.items() if not value.is_floating_point()}
        self._buffer_of = {
            name: f"constant_{row}" for row, name in enumerate(constants.keys() - self._shapes)
        }
        for name, buffer in self._buffer_of.items():
            self.register_buffer(buffer, constants[name])

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the last node for the input `x`."""
        values = {name: self.get_buffer(buffer) for name, buffer in self._buffer_of.items()}
        values |= self._shapes | {self._source: x}
        for row, node in enumerate(self._nodes):
            inputs = [values[name] for name in node.inputs if name]
            values[node.output] = OPERATORS[node.operator](*inputs, **node.attributes)
            for name in set(node.inputs):
                if self._last_use[name] == row:
                    values.pop(name, None)  # without gradients that frees the memory
        return values[self._nodes[-1].output]


def read_graph(model: Any, onnx: Any) -> OnnxGraph:
    """Build the graph of an `onnx.ModelProto` with one input.

    Args:
        model: result of `onnx.load`.
        onnx: the optional module of that name.

    Raises:
        ValueError: if the graph has several inputs or isn't supported.
    """
    to_array = onnx.numpy_helper.to_array
    inputs = [value.name for value in model.graph.input]
    if len(inputs) != 1:
        raise ValueError(f"expected an ONNX graph with one input, got {inputs}: another model's?")
    constants = {value.name: _tensor(to_array(value)) for value in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
        if node.op_type == "Constant":
            constants[node.output[0]] = _tensor(to_array(attributes["value"]))
        else:
            nodes.append(Node(node.op_type, list(node.input), node.output[0], attributes))
    return OnnxGraph(nodes, constants, source=inputs[0])


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(array.copy())


def _check_node(node: Node, known: set[str]) -> None:
    if node.operator not in OPERATORS:
        raise ValueError(
            f"ONNX operator {node.operator} isn't supported: another model's? Known: {', '.join(OPERATORS)}"
        )
    unknown = [name for name in node.inputs if name and name not in known]
    if unknown:
        raise ValueError(f"nothing computes the input {unknown[0]} of the ONNX node {node.output}")
    try:
        inspect.signature(OPERATORS[node.operator]).bind(*node.inputs, **node.attributes)
    except TypeError as error:
        raise ValueError(f"ONNX operator {node.operator} with {node.attributes}: {error}") from error


def _symmetric(pads: Sequence[int]) -> list[int]:
    """Return ONNX's (top, left, bottom, right) as torch's (vertical, horizontal)."""
    if list(pads[:2]) != list(pads[2:]):
        raise ValueError(f"expected equal ONNX padding on opposite sides, got {pads}")
    return list(pads[:2])


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kernel_shape: list[int],
    strides: list[int],
    pads: list[int],
    dilations: list[int],
    group: int,
) -> Tensor:
    assert list(weight.shape[2:]) == list(kernel_shape)
    return functional.conv2d(x, weight, bias, strides, _symmetric(pads), dilations, group)


def _batch_norm(
    x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor, *, epsilon: float, momentum: float
) -> Tensor:
    return functional.batch_norm(x, mean, var, scale, bias, momentum=momentum, eps=epsilon)


def _average_pool(
    x: Tensor,
    *,
    kernel_shape: list[int],
    strides: list[int],
    pads: list[int],
    ceil_mode: int,
    count_include_pad: int,
) -> Tensor:
    return functional.avg_pool2d(
        x, kernel_shape, strides, _symmetric(pads), bool(ceil_mode), bool(count_include_pad)
    )


def _slice(x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor, steps: Tensor | None = None) -> Tensor:
    index = [slice(None)] * x.ndim
    strides = torch.ones_like(starts) if steps is None else steps
    for axis, *bounds in zip(axes.tolist(), starts.tolist(), ends.tolist(), strides.tolist(), strict=True):
        index[axis] = slice(*bounds)
    return x[tuple(index)]


def _reshape(x: Tensor, shape: Tensor) -> Tensor:
    return x.reshape([x.shape[i] if size == 0 else size for i, size in enumerate(shape.tolist())])


def _cast(x: Tensor, *, to: int) -> Tensor:
    if to not in CASTS or x.is_floating_point():
        raise ValueError(f"ONNX Cast of {x.dtype} to type {to} isn't supported: only shapes are cast")
    return x.to(CASTS[to])


def _hard_sigmoid(x: Tensor, *, alpha: float, beta: float) -> Tensor:
    return (alpha * x + beta).clamp(0, 1)


def _reduce_mean(x: Tensor, *, axes: list[int], keepdims: int = 1) -> Tensor:
    return x.mean(axes, keepdim=bool(keepdims))


OPERATORS: dict[str, Callable[..., Tensor]] = {
    "Add": lambda a, b: a + b,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Clip": lambda x, low, high: x.clamp(low, high),
    "Concat": lambda *parts, axis: torch.cat(parts, axis),
    "Conv": _conv,
    "Div": lambda a, b: a / b,
    "GlobalAveragePool": lambda x: x.mean((2, 3), keepdim=True),
    "HardSigmoid": _hard_sigmoid,
    "MatMul": lambda a, b: a @ b,
    "Mul": lambda a, b: a * b,
    "Pow": lambda a, b: a**b,
    "ReduceMean": _reduce_mean,
    "Relu": lambda x: x.relu(),
    "Reshape": _reshape,
    "Shape": lambda x: torch.tensor(x.shape),
    "Sigmoid": lambda x: x.sigmoid(),
    "Slice": _slice,
    "Softmax": lambda x, *, axis: x.softmax(axis),
    "Sqrt": lambda x: x.sqrt(),
    "Squeeze": lambda x, *, axes: x.squeeze(tuple(axes)),
    "Sub": lambda a, b: a - b,
    "Transpose": lambda x, *, perm: x.permute(perm),
}
