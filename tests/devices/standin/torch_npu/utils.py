"""The one function of the plugin's that the product asks."""


def get_cann_version(module: str = "CANN") -> str:
    """The version of a part of Ascend's software."""
    return {"CANN": "8.3.RC1", "DRIVER": "25.2"}.get(module, "")
