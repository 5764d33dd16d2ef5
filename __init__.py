"""ZeroConv: ControlNet for ComfyUI."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """ComfyUI's way in; nothing heavy is imported before it is called."""
    import logging

    from comfy_api.latest import ComfyExtension

    try:
        from .nodes import NODES, dosing
        from .nodes.host import asked, examples, files

        files.register_lab()
        asked.answer("schedule", dosing.asked)
        examples.lend_examples()
    except Exception:
        # The host would lose the whole pack with one line in the log.
        logging.getLogger(__name__).exception("ZeroConv cannot be loaded")
        raise

    class ZeroConv(ComfyExtension):
        async def get_node_list(self):
            return NODES

    return ZeroConv()
