"""The page of `llava-mod demo`; what it shows comes from `side_by_side`."""

import os
from pathlib import Path

# read where the library is imported, and where its parts are made
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr

from llava_mod_hf.talking.conversation import read_picture
from llava_mod_hf.talking.side_by_side import side_by_side

KEPT = 3600  # seconds for which uploads are kept


def build_page(models, sampling):
    """
    A page with a picture, a question, and the answer of each model.

    Args:
        models (`dict[str, tuple]`): `(model, processor)` by title; the first one's experts are shown first.
        sampling ([`~llava_mod_hf.talking.sampling.Sampling`]): of each.

    Returns:
        `gradio.Blocks`.
    """

    def ask(path, question):
        try:
            picture = None if path is None else read_picture(path, Path(path).name)
            for said in side_by_side(list(models.values()), picture, question, sampling):
                yield [value for each in said for value in each]
        except ValueError as error:
            raise gr.Error(str(error), title="Not asked", print_exception=False) from error

    with gr.Blocks(title="LLaVA-MoD", analytics_enabled=False, delete_cache=(KEPT, KEPT)) as page:
        with gr.Row():
            with gr.Column():
                picture = gr.Image(label="Picture", sources=["upload", "clipboard"], height=260, elem_id="picture")
                # the file as it was uploaded: one that is no picture would be refused without a word of ours
                picture.preprocess = lambda payload: None if payload is None else payload.path
                question = gr.Textbox(label="Question", elem_id="question")
                button = gr.Button("Ask", variant="primary", elem_id="ask")
            said = []
            for number, title in enumerate(models):
                with gr.Column():
                    text = gr.Textbox(label=title, lines=4, interactive=False, elem_id=f"answer-{number}")
                    said.append([text, gr.Markdown(elem_id=f"figures-{number}")])
        for number, shown in enumerate(said):
            shown.append(gr.HTML(elem_id=f"experts-{number}"))
        outputs = [part for shown in said for part in shown]
        # one question at a time: two would share the processor, and the times be wrong
        gr.on([button.click, question.submit], ask, [picture, question], outputs, concurrency_limit=1)
    return page


def serve(page, *, host, port, share):
    """
    Begins to serve a page, in threads of its own.

    Args:
        page (`gradio.Blocks`), host (`str`), port (`int`): 0 takes any that is free.
        share (`bool`): whether a tunnel of the library's makers is opened to it.

    Returns:
        `str`: its address.

    Raises:
        ValueError: if the port is taken, or nobody may listen there.
    """
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port or None,  # the library finds a free one
            share=share,
            quiet=True,
            inbrowser=False,
            ssr_mode=False,
            mcp_server=False,
            run_history=False,
            footer_links=[],
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise ValueError(
            f"The page cannot be served on `{host}`, port {port} ({' '.join(str(error).split())}): give others, or "
            "`port` 0 for a free one."
        ) from error
    return address
