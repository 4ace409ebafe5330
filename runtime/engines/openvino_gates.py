"""Gated linear units (GEGLU, arXiv 2002.05202) in OpenVINO graphs as two products instead of one whose result is cut in two.

OpenVINO copies both halves out of the result, which is eight times as wide as the layer, before it computes with them. A product of its own
takes GELU along.
"""


def split_gates(model):
    """Cut the weights of products that are cut in two right after, in place. Returns what must live as long as the model does: the
    halves lie in the memory of the whole.
    """
    from openvino import opset13 as ops

    kept = []
    for split in model.get_ordered_ops():
        found = _product(split) if split.get_type_name() == "Split" and split.get_output_size() == 2 else None
        if found is None:
            continue
        product, weights, bias = found
        half = weights.get_output_shape(0)[0] // 2
        for i in range(2):
            part = slice(i * half, (i + 1) * half)
            rows, shift = (_constant(whole, data) for whole, data in ((weights, weights.data[part]), (bias, bias.data[part])))
            split.output(i).replace(ops.add(ops.matmul(product.input_value(0), rows, False, True), shift).output(0))
        kept += [weights, bias]
    model.validate_nodes_and_infer_types()
    return kept


def _product(split):
    """Return (MatMul, weights [2 N, K], bias [2 N]) of x W^T + b that a node cuts along its last axis, None where it is something else."""
    add = split.input_value(0).get_node()
    axis, last = split.input_value(1).get_node(), split.get_output_partial_shape(0).rank.get_length() - 1
    if add.get_type_name() != "Add" or axis.get_type_name() != "Constant" or axis.data.item() not in (-1, last):
        return None
    product, bias = (add.input_value(i).get_node() for i in range(2))
    if product.get_type_name() != "MatMul" or bias.get_type_name() != "Constant":
        return None
    weights, turned = product.input_value(1).get_node(), product.get_attributes()["transpose_b"]
    if weights.get_type_name() == "Transpose" and len(weights.get_output_shape(0)) == 2:
        weights, turned = weights.input_value(0).get_node(), not turned
    plain = weights.get_type_name() == "Constant" and turned and not product.get_attributes()["transpose_a"]
    return (product, weights, bias) if plain and list(bias.data.shape) == list(weights.get_output_shape(0)[:1]) else None


def _constant(like, part):
    """Return a Constant on a contiguous part of another's memory."""
    import openvino

    return openvino.op.Constant(openvino.Tensor(part, openvino.Shape(list(part.shape)), like.get_element_type()), shared_memory=True)
