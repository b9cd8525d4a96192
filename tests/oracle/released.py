"""The released modules' constructor arguments and state dicts, with the names used here.

cvpr2022: kernel size by stage, 9 7 5 3; offset_range_factor f > 0: bounded by tanh to f cells; 0: unbounded;
          f < 0: tanh of the coordinate
datpp2023: kernel size as given; f >= 0: bounded by tanh to f cells; f < 0: coordinate clamped
"""

from typing import Any

from .basic import Array

State = dict[str, Array]
STAGE_KERNELS_2022 = (9, 7, 5, 3)


def leaves(state: State, name: str) -> dict[str, Array]:
    """Return {"weight", "bias" if present}; the weight of a 1x1 convolution without its two last axes."""
    weight = state[f"{name}.weight"]
    found = {"weight": weight[:, :, 0, 0] if weight.ndim == 4 and weight.shape[2:] == (1, 1) else weight}
    if f"{name}.bias" in state:
        found["bias"] = state[f"{name}.bias"]
    return found


def deformable_params(state: State) -> dict[str, Any]:
    """Return the parameters for deformable.deformable_attention."""
    params: dict[str, Any] = {
        "query": leaves(state, "proj_q"),
        "key": leaves(state, "proj_k"),
        "value": leaves(state, "proj_v"),
        "output": leaves(state, "proj_out"),
        "offset_network": {
            "depthwise": leaves(state, "conv_offset.0"),
            "norm": leaves(state, "conv_offset.1.norm"),
            "pointwise": leaves(state, "conv_offset.3"),
        },
    }
    if "rpe_table" in state:
        params["position_bias"] = {"table": state["rpe_table"]}
    elif "rpe_table.0.weight" in state:
        hidden, out = leaves(state, "rpe_table.0"), leaves(state, "rpe_table.2")
        params["position_bias"] = {"hidden": hidden, "out": out}
    elif "rpe_table.weight" in state:
        params["position_bias"] = {"depthwise": leaves(state, "rpe_table")}
    return params


def deformable_config(release: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration for deformable.deformable_attention."""
    first = release == "cvpr2022"
    return {
        "convention": release,
        "heads": arguments["n_heads"],
        "groups": arguments["n_groups"],
        "stride": arguments["stride"],
        "kernel_size": STAGE_KERNELS_2022[arguments["stage_idx"]] if first else arguments["ksize"],
        "offset_bound": offset_bound(release, arguments["offset_range_factor"], arguments["no_off"]),
        "offset_range": arguments["offset_range_factor"],
        "bias": bias_kind(arguments),
        "average_pool": arguments["no_off"],
    }


def offset_bound(release: str, factor: float, no_off: bool) -> str:
    if no_off:
        return "none"
    if release == "cvpr2022":
        return "tanh_cells" if factor > 0 else "raw" if factor == 0 else "tanh_coordinates"
    return "tanh_cells" if factor >= 0 else "clamp"


def bias_kind(arguments: dict[str, Any]) -> str:
    if arguments["no_off"] or not arguments["use_pe"]:
        return "none"
    if arguments["dwc_pe"]:
        return "depthwise"
    if arguments["fixed_pe"]:
        return "fixed"
    return "log_cpb" if arguments.get("log_cpb") else "table"


def window_params(state: State) -> dict[str, Any]:
    """Return the parameters for windows.window_attention."""
    table = state["relative_position_bias_table"]
    return {"qkv": leaves(state, "proj_qkv"), "output": leaves(state, "proj_out"), "table": table}


def neighborhood_params(state: State) -> dict[str, Any]:
    """Return the parameters for neighborhood.neighborhood_attention."""
    return {"qkv": leaves(state, "qkv"), "output": leaves(state, "proj"), "rpb": state["rpb"]}
