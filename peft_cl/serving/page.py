"""The page: drop an image and see what it is taken for; teach a class, undo it, forget it, save the adapter."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..text import MOST, counted, plain, rounded
from . import show
from .images import MOST_BYTES, MOST_IMAGES, ImageFault, read_image
from .loading import load_session
from .saving import check_output
from .session import Session


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio makes its first request
try:
    import gradio as gr
except ImportError as error:
    raise ImportError('The page needs gradio, which is not installed: pip install "peft-cl[serve]".') from error


#: Classes with a bar.
BARS = 5
#: Seconds after which images that were dropped are removed from the disk.
KEPT = 3600
#: Faults of what the user gave; others are the program's.
FAULTS = (ValueError, ImageFault)
CSS = Path(__file__).with_name("page.css")


class Page(gr.Blocks):
    """Blocks that bring their own look: nothing is fetched from elsewhere, so the page works without a network."""

    def launch(self, *args: Any, **given: Any) -> Any:
        fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
        look = {
            "theme": gr.themes.Default(primary_hue="blue", neutral_hue="slate", **fonts),
            "css_paths": [CSS],
            "footer_links": [],
            "max_file_size": MOST_BYTES,
        }
        return super().launch(*args, **{**look, **given})


def make_page(
    adapter: str | Session, *, read_only: bool = False, output: str | Path | None = None, **options: Any
) -> gr.Blocks:
    """Make the page of an adapter, as gradio's `Blocks`; `launch()` starts its server.

    All who have the page open use one adapter: what one of them teaches, the others see when they load the page again.
    It is kept in memory, and is gone when the server ends, unless it is saved.

    Args:
        adapter: Its folder or its name on the Hub, or a session.
        read_only: Answer alone: nothing can be taught or saved.
        output: Folder to which the page may save, new or empty; `None`: it cannot.
        **options: `model`, `dtype` and `trust_remote_code` of `load_session`.

    Raises:
        ImportError: gradio is not installed.
        CommandError: The adapter cannot be loaded.
        FileExistsError: `output` holds files already.

    Example:
        >>> make_page("user/adapter", read_only=True).launch()    # doctest: +SKIP
    """
    if output is not None and not read_only:
        check_output(output)
    session = adapter if isinstance(adapter, Session) else load_session(adapter, read_only=read_only, **options)
    why_not = None if read_only else session.why_not
    with Page(title=f"{session.name} - peft-cl", analytics_enabled=False, delete_cache=(KEPT, KEPT)) as page:
        gr.HTML(show.heading(session, read_only))
        with gr.Row():
            with gr.Column(min_width=320):
                image, answer = _recognising(session)
            with gr.Column(min_width=320):
                if not read_only:
                    gr.HTML(show.title("Teach a class"))
                if why_not:
                    gr.HTML(show.fault(why_not), elem_id="why-not")
                if read_only or why_not:
                    gr.HTML(show.classes(session), elem_id="classes")
                else:
                    _teaching(page, session, image, answer, output)
    return page


def _recognising(session: Session) -> tuple[Any, list[Any]]:
    """The area in which an image is dropped; the image, and what shows the answer."""
    gr.HTML(show.title("Recognise"))
    image = gr.Image(
        type="filepath", image_mode=None, sources=["upload", "clipboard"], label="Image", height=280, elem_id="image"
    )
    # gradio would open the file, and say its own words of a damaged one. (A subclass would have it write a stub file.)
    image.preprocess = lambda given: None if given is None else given.path
    label = gr.Label(num_top_classes=BARS, label="Class", elem_id="answer")
    details = gr.HTML(elem_id="details", apply_default_css=False)
    image.change(partial(_recognise, session), image, [label, details], api_name="classify", show_progress="minimal")
    return image, [label, details]


def _recognise(session: Session, file: str | None) -> tuple[dict[str, float] | None, str]:
    if file is None:
        return None, ""
    try:
        answer = session.classify(read_image(file, session.processor))
    except FAULTS as error:
        return None, show.fault(error)
    return show.bars(answer, BARS), show.details(answer, session)


def _teaching(page: Any, session: Session, image: Any, answer: Sequence[Any], output: str | Path | None) -> None:
    """The area in which classes are taught and taken back."""
    name, images, teach, status = _lesson()
    undo, save, chosen, forget = _steps(session, output)
    classes = gr.HTML(show.classes(session), elem_id="classes")
    shown = [status, classes, chosen, undo]

    def refreshed(message: str = "") -> tuple[Any, ...]:
        with session.lock:
            names = gr.update(choices=list(session.classes), value=None)
            return message, show.classes(session), names, gr.update(interactive=session.can_undo)

    def attempt(action: Callable[..., str], *given: Any) -> tuple[Any, ...]:
        """The action, whose fault is said on the page; the page shows what is known afterwards."""
        try:
            return refreshed(show.done(action(session, *given)))
        except FAULTS as error:
            return refreshed(show.fault(error))

    def emptied(message: str) -> tuple[Any, ...]:
        """The name and the images are wanted no more once they are learnt."""
        return ("", None) if show.is_done(message) else (gr.skip(), gr.skip())

    quiet = {"api_visibility": "private", "show_progress": "hidden"}
    for button, action, inputs, word in (
        (teach, _teach, [name, images], "teach"),
        (undo, _undo, [], "undo"),
        (forget, _forget, [chosen], "forget"),
    ):
        happened = button.click(partial(attempt, action), inputs, shown, api_name=word, show_progress="minimal")
        if button is teach:
            happened.then(emptied, status, [name, images], **quiet)
        happened.then(partial(_recognise, session), image, answer, **quiet)
    if output is not None:
        action = partial(_save, output=output)
        save.click(partial(attempt, action), [], shown, api_name="save", show_progress="minimal")
    page.load(refreshed, outputs=shown, **quiet)


def _lesson() -> tuple[Any, ...]:
    """Name and images of a class, the button to teach it, and the place for what became of it."""
    name = gr.Textbox(label="Name of the class", placeholder="okapi", max_length=MOST, elem_id="name")
    images = gr.Gallery(
        label=f"Images of it: a handful, up to {MOST_IMAGES}",
        type="filepath",
        file_types=["image"],
        sources=["upload", "clipboard"],
        interactive=True,
        columns=5,
        height=200,
        object_fit="cover",
        elem_id="images",
    )
    return name, images, gr.Button("Teach", variant="primary", elem_id="teach"), gr.HTML(elem_id="status")


def _steps(session: Session, output: str | Path | None) -> tuple[Any, ...]:
    """The buttons to undo and to save, and a class to forget with its button."""
    with gr.Row():
        undo = gr.Button("Undo", interactive=session.can_undo, elem_id="undo")
        save = gr.Button("Save", visible=output is not None, elem_id="save")
    with gr.Row(elem_id="forgetting"):
        chosen = gr.Dropdown(list(session.classes), label="Forget a class", value=None, elem_id="chosen", scale=3)
        forget = gr.Button("Forget", elem_id="forget", scale=1, min_width=96)
    return undo, save, chosen, forget


def _teach(session: Session, name: str, images: Sequence[tuple[str, str | None]] | None) -> str:
    files = [file for file, _ in images or ()]
    if len(files) > MOST_IMAGES:
        raise ValueError(
            f"There are {len(files)} images, but at most {MOST_IMAGES} are taken at once. Leave some out."
        )
    taught = session.teach(name, [read_image(file, session.processor) for file in files])
    what = "is known now" if taught.is_new else "is known better now"
    return f"{plain(taught.name)} {what}: {counted(taught.images, 'image')}, {rounded(taught.seconds, 1)} s."


def _undo(session: Session) -> str:
    session.undo()
    return "The last step is undone."


def _forget(session: Session, name: str | None) -> str:
    if not name:
        raise ValueError("No class is chosen. Choose one in the list.")
    session.forget(name)
    return f"{plain(name)} is forgotten."


def _save(session: Session, output: str | Path) -> str:
    try:
        folder = session.save(output)
    except OSError as error:  # whose text has the server's paths
        raise ValueError(
            f"The adapter cannot be saved: {error.strerror or type(error).__name__}. Make room, or give the right to "
            "write there, and save again."
        ) from error
    return f"Saved in the folder {plain(folder.name)}."
