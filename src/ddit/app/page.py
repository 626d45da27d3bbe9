"""The page itself (gradio). It asks nothing of other machines: no analytics, no fonts, no scripts from elsewhere."""

from __future__ import annotations

import functools
import html
import itertools
import secrets
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from ddit.app.draw import PATCHES, SKIPPING, Drawn, Studio, words_of
from ddit.app.study import DATABASE, PICTURES, Study, markdown
from ddit.config import PatchSchedule
from ddit.pipelines import outputs

FPS = 8
"""Of clips in the first tab; those of a study are files already."""
PLAY = (
    """() => { for (const clip of document.querySelectorAll('.pair video')) { clip.currentTime = 0; clip.play() } }"""
)
"""Starts two players together."""
STYLE = ".pair .image-frame, .pair .image-frame img, .pair video { width: 100%; max-height: 70vh; object-fit: contain }"
"""Small pictures are enlarged, all alike."""


def told(handler: Callable[..., Any]) -> Callable[..., Any]:
    """What can't be done is told on the page, in the library's own sentence, and so are its warnings."""

    @functools.wraps(handler)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: gr.Warning(html.escape(str(message)))
            try:
                return handler(*args, **kwargs)
            except (ValueError, OSError, RuntimeError, ArithmeticError) as error:
                raise gr.Error(html.escape(str(error)), duration=None, print_exception=False) from error

    return wrapped


def build(studio: Studio, study: Study | None, *, adapter: str | None) -> gr.Blocks:
    """The page: a tab to draw in, and one of the study if there is one.

    Args:
        adapter: Name of one, to begin with; by default the preset's.
    """
    with gr.Blocks(title="ddit", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        with gr.Tab("Draw"):
            _draw_tab(studio, adapter)
        if study is not None:
            key = study.digest("browser")
            # A voter is a browser, after a restart too. Kept only from outside of a tab.
            voter = gr.BrowserState(None, storage_key=f"ddit-{key}", secret=key)
            with gr.Tab("Blind study"):
                _study_tab(page, study, voter)
    return page


def serve(page: gr.Blocks, study: Study | None, host: str, port: int) -> None:
    """Serve the page until interrupted; of a study only the pictures can be fetched."""
    folder = None if study is None else study.folder.resolve()
    _, address, _ = page.launch(
        quiet=True,
        prevent_thread_lock=True,
        server_name=host,
        server_port=port,
        share=False,
        ssr_mode=False,
        show_error=True,
        footer_links=[],
        theme=gr.themes.Default(font=("system-ui", "sans-serif"), font_mono=("monospace",)),
        css=STYLE,
        allowed_paths=[] if folder is None else [str(folder / PICTURES)],
        blocked_paths=[] if folder is None else [str(folder / f"{DATABASE}{end}") for end in ("", "-wal", "-shm")],
    )
    print(f"open {address} in a browser; Ctrl+C ends", flush=True)
    page.block_thread()


def _draw_tab(studio: Studio, adapter: str | None) -> None:
    own = studio.preset.patches
    tau = own.threshold if isinstance(own, PatchSchedule) else PatchSchedule().threshold
    with gr.Row():
        with gr.Column(scale=1, min_width=320):
            prompt = gr.Textbox(label="prompt", lines=2, elem_id="prompt")
            with gr.Row():
                seed = gr.Number(0, label="seed", precision=0)
                steps = gr.Number(studio.steps, label="steps", precision=0)
            patches = gr.Radio(list(PATCHES), value="rule", label="patches")
            rule = gr.Number(None, label=f"threshold: larger uses larger patches (empty: {tau:g})")
            speed = gr.Number(2, label="speed: times less work, by patches alone")
            schedule = gr.Textbox("1 1 1 4 4 2 2 1", label="schedule: scale of each step, the last one holds")
            skip = gr.Radio(list(SKIPPING), value="off", label="skip")
            amount = gr.Number(3, label="amount: times less work, PSNR in dB, or change")
            parts = gr.Textbox(
                adapter or "", label="adapter: folder or hub id, or none (empty: the model's own, if any)"
            )
            button = gr.Button("Draw", variant="primary", elem_id="draw")
        with gr.Column(scale=2):
            shown = _pair_of_players(studio.draws_video)
            figures = gr.Dataframe(headers=["figure", "value"], label="what it cost", interactive=False)
            plot = gr.Image(show_label=False, type="filepath", interactive=False, buttons=[])
    _toggle(patches, rule, "rule", "paper")
    _toggle(patches, speed, "speed")
    _toggle(patches, schedule, "schedule")
    _toggle(skip, amount, *SKIPPING[1:])
    knobs = [prompt, seed, steps, patches, rule, speed, schedule, skip, amount, parts]
    handler = told(_drawer(studio))
    gr.on(
        [button.click, prompt.submit],
        handler,
        knobs,
        [*shown, figures, plot],
        concurrency_limit=1,
        api_visibility="private",
        show_progress_on=figures,
    )


def _toggle(choice: gr.Radio, knob: Any, *values: str) -> None:
    """Show a knob only where it means something."""
    knob.visible = choice.value in values
    choice.change(lambda value: gr.update(visible=value in values), choice, knob, api_visibility="private")


def _pair_of_players(video: bool) -> list[Any]:
    """A slider between two pictures, or two players that start together."""
    if not video:
        return [gr.ImageSlider(label="plain | dynamic", format="png", elem_classes="pair", max_height=640)]
    with gr.Row():
        clips = [_clip(label) for label in ("plain", "dynamic")]
    gr.Button("Play both").click(None, js=PLAY)
    return clips


def _clip(label: str) -> gr.Video:
    return gr.Video(label=label, elem_classes="pair", interactive=False, loop=True, buttons=[])


def _drawer(studio: Studio) -> Callable[..., list[Any]]:
    """The handler that draws; its files live as long as it does."""
    files = tempfile.TemporaryDirectory(prefix="ddit-app-")
    numbers = itertools.count()

    def draw(
        prompt: str,
        seed: int | None,
        steps: int | None,
        patches: str,
        rule: float | None,
        speed: float | None,
        schedule: str,
        skip: str,
        amount: float | None,
        adapter: str,
        progress: Any = gr.Progress(),  # noqa: B008 (gradio looks for it here)
    ) -> list[Any]:
        words = words_of(
            patches=patches,
            threshold=rule,
            speed=speed,
            schedule=schedule,
            skip=skip,
            amount=amount,
            adapter=adapter,
        )
        if seed is None or steps is None:
            raise ValueError("seed and steps must be numbers; fill them in")
        progress(0, desc="warming up")

        def on_step(name: str, step: int, total: int, scales: list[int]) -> None:
            progress((step, total), desc=f"{name}, {f'scale {scales[0]}' if scales[0] else 'skipped'}", unit="steps")

        drawn = studio.draw(prompt, seed, steps, words, on_step)
        stem = Path(files.name) / str(next(numbers))
        drawn.plot(stem.with_suffix(".png"))
        return [*_shown(drawn, stem), list(drawn.figures.items()), stem.with_suffix(".png")]

    return draw


def _shown(drawn: Drawn, stem: Path) -> list[Any]:
    """What `_pair_of_players` takes."""
    runs = {"plain": drawn.plain, "dynamic": drawn.dynamic}
    if drawn.plain.pictures.ndim == 4:
        return [tuple(outputs.eight_bits(run.pictures[0]) for run in runs.values())]
    paths = {name: stem.with_name(f"{stem.name}-{name}.mp4") for name in runs}
    for name, run in runs.items():
        outputs.save(paths[name], run.pictures, fps=FPS)
    return list(paths.values())


BUTTONS = {"left": "Left is better", "equal": "Equally good", "bad": "Both are bad", "right": "Right is better"}
"""Answer (`ddit.app.study.ANSWERS`) -> what its button says."""


def _study_tab(page: gr.Blocks, study: Study, voter: gr.BrowserState) -> None:
    pair = gr.Textbox(visible="hidden")  # kept in the browser, so that a restart does not part a vote from its pair
    heading = gr.Markdown()
    video = study.about["suffix"] == ".mp4"
    with gr.Column() as question:
        prompt = gr.Textbox(label="prompt", interactive=False)
        with gr.Row():
            still = functools.partial(gr.Image, type="filepath", elem_classes="pair", interactive=False, buttons=[])
            left, right = ((_clip if video else still)(label=side) for side in ("left", "right"))
        if video:
            gr.Button("Play both").click(None, js=PLAY)
        with gr.Row():
            buttons = {answer: gr.Button(text, elem_id=f"vote-{answer}") for answer, text in BUTTONS.items()}
    back = gr.Button("Back to the pair before", size="sm", elem_id="back")
    shown = [voter, pair, heading, question, prompt, left, right]
    free: dict[str, Any] = {"concurrency_limit": None, "api_visibility": "private", "show_progress": "hidden"}
    page.load(told(functools.partial(_show, study)), voter, shown, **free)
    back.click(told(functools.partial(_show, study)), [voter, pair], shown, **free)
    for answer, button in buttons.items():
        button.click(told(functools.partial(_vote, study, answer)), [voter, pair], shown, **free)


def _vote(study: Study, answer: str, voter: str | None, pair: str) -> list[Any]:
    study.vote(voter or "", pair, answer)
    return _show(study, voter)


def _show(study: Study, voter: str | None, before: str | None = None) -> list[Any]:
    """The voter's next pair, or the one ``before``; at the end the results, which would sway votes earlier."""
    voter = voter or secrets.token_hex(8)
    order = study.order(voter)
    chosen = study.turn(voter, order, before)
    if chosen is None:
        text = f"Thank you, these were all pairs.\n\n{markdown(study.results())}" if order else "No pair is drawn yet."
        return [voter, "", text, gr.update(visible=False), "", None, None]
    sides = [chosen.plain, chosen.dynamic]
    if study.on_left(voter, chosen.pair) == "dynamic":
        sides.reverse()
    text = f"Pair {order.index(chosen) + 1} of {len(order)}. Which one is better, as a picture of the prompt?"
    return [voter, chosen.pair, text, gr.update(visible=True), chosen.prompt, *sides]
