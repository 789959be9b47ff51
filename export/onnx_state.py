"""The state at the scale that a network in an .onnx file reads it in: skipstep.plans.parameterization as operators."""

from __future__ import annotations

from typing import Final

from onnx import GraphProto, NodeProto, TensorProto, helper

from skipstep.networks.graphs import SAMPLE
from skipstep.networks.spec import NetworkSpec
from skipstep.plans.parameterization import FLOW_TIMESTEPS

SCALED: Final = "sample/scaled"


def scaled_state(graph: GraphProto, spec: NetworkSpec) -> list[NodeProto]:
    """The operators from `sample` and `timestep` to SCALED, with their constants in the graph; none where the network
    reads the plan's own state. They follow from the time but for the last, so that is all that a step computes."""
    if spec.state == "vp":
        return []
    nodes: list[NodeProto] = []

    def value(operator: str, *inputs: str | float) -> str:
        name = f"scale/{len(nodes)}"
        names = []
        for place, given in enumerate(inputs):
            if isinstance(given, float):
                names.append(f"{name}/{place}")
                graph.initializer.append(helper.make_tensor(names[-1], TensorProto.FLOAT, [], [given]))
            else:
                names.append(given)
        nodes.append(helper.make_node(operator, names, [name], name=name))
        return name

    time = "timestep"
    one = value("Exp", value("Mul", time, 0.0))  # With a row for each sample.
    image, noise = one, time
    if spec.time_input == "c_noise":
        noise = value("Exp", value("Mul", time, 4.0))
    elif spec.time_input == "log_snr":
        noise = value("Exp", value("Mul", time, -0.5))
    elif spec.time_input == "alpha_bar":
        image, noise = value("Sqrt", time), value("Sqrt", value("Sub", one, time))
    elif spec.time_input == "flow":
        noise = value("Div", time, FLOW_TIMESTEPS)
        image = value("Sub", one, noise)
    squares = value("Mul", image, image), value("Mul", noise, noise)
    both = value("Sqrt", value("Add", *squares))
    if spec.state == "ve":
        scale = value("Div", both, image)
    elif spec.state == "edm":
        data = value("Mul", squares[0], (spec.sigma_data or 0.0) ** 2)
        scale = value("Div", both, value("Sqrt", value("Add", squares[1], data)))
    else:
        scale = value("Div", both, value("Add", image, noise))
    trailing = list(range(1, 1 + len(spec.sample_shape)))
    graph.initializer.append(helper.make_tensor("scale/axes", TensorProto.INT64, [len(trailing)], trailing))
    nodes.append(helper.make_node("Unsqueeze", [scale, "scale/axes"], ["scale/wide"], name="scale/wide"))
    nodes.append(helper.make_node("Mul", [SAMPLE, "scale/wide"], [SCALED], name=SCALED))
    return nodes
