"""Serve the page: dense against sparse in the browser, with a stored comparison already there."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from dit_sparse.app.blind import BlindTest
from dit_sparse.app.limits import Limits
from dit_sparse.app.page import build
from dit_sparse.app.results import Results
from dit_sparse.app.site import Shown, Site
from dit_sparse.app.studio import Studio

HERE = Path(__file__).parent
STORED = HERE.parent / "assets" / "demo"
UPLOADS = "dit-sparse-uploads-"
SESSIONS = 200  # visitors whose state is kept


@dataclass(frozen=True, eq=False)
class Server:
    """Hold a page that is served; `close` ends its job and removes what it wrote."""

    site: Site
    page: gr.Blocks
    address: str

    def close(self) -> None:
        self.page.close()
        self.site.close()
        shutil.rmtree(self.site.uploads, ignore_errors=True)


def launch(
    results: Path | None = None,
    port: int = 7860,
    *,
    host: str = "127.0.0.1",
    model: str = "bundled",
    device: str | None = None,
    dtype: str | None = None,
    limits: Limits | None = None,
    block: bool = True,
) -> Server:
    """Serve the page; with `block` until Ctrl-C. On a host other than this machine anyone who reaches it may use it.

    results: the folder of `compare` that is shown first, None for the stored one.

    Raises:
        FileNotFoundError: there is no report.json in the folder, or a video that it names is missing.
        ValueError: the report does not follow its schema, or torch does not see the device.
        OSError: the port is taken.
    """
    first = Shown.read(STORED if results is None else results)
    kept = Results()
    studio = Studio(model, device, dtype, limits, results=kept)
    # Gradio keeps uploads and copies here; its usual folder is shared with every other Gradio app of this machine.
    uploads = Path(tempfile.mkdtemp(prefix=UPLOADS))
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)
    site = Site(studio, first, BlindTest(kept.folder / "blind"), uploads)
    page = build(site)
    try:
        _, address, _ = page.queue(max_size=4 * (studio.limits.waiting + 1)).launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            ssr_mode=False,
            run_history=False,
            quiet=True,
            show_error=False,
            state_session_capacity=SESSIONS,
            max_file_size=studio.limits.upload_bytes,
            allowed_paths=site.allowed_paths,
            theme=gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
            css_paths=[HERE / "page.css"],
            footer_links=[],
        )
    except BaseException:
        site.close()
        shutil.rmtree(uploads, ignore_errors=True)
        raise
    server = Server(site, page, address)
    if block:
        print(f"dit-sparse demo: {address} (Ctrl-C ends it)", flush=True)
        try:
            page.block_thread()
        finally:
            server.close()
    return server
