"""ZeroConv: ControlNet for ComfyUI."""


async def comfy_entrypoint():
    """ComfyUI's way in; nothing heavy is imported before it is called."""
    from comfy_api.latest import ComfyExtension

    class ZeroConv(ComfyExtension):
        async def get_node_list(self):
            return []

    return ZeroConv()
