"""The chat as a page in the browser: the same conversation, its memory to be seen, and facts to be taught.

gradio (`pip install gradio`) draws and serves it, and is imported where it is used.
"""

if __name__ == "__main__":
    raise SystemExit("Esta pieza no se ejecuta. Los programas: verify_, load_, train_ y chat_phi_engram.py (--help)")

import base64
import importlib.metadata
import io
import os
import re
import secrets
import threading
import time
from contextlib import redirect_stdout
from pathlib import Path

from engram.console import UserError, in_notebook, spanish
from engram.conversation import Chat
from engram.facts import STEPS
from engram.opening import about_memory, is_toy, phi_size
from engram.report import OUTPUT
from engram.visits import Visit, answered, ask, begun_again, compared, forgotten, taught

FIRST_PORT = 7860  # gradio's own; where it is taken, the next that is free
CSS = """
#charla .message, #con textarea, #sin textarea {font-family: var(--font-mono); font-size: .9em}
#charla .message-markdown-disabled {white-space: pre-wrap}
#charla details {white-space: normal}
.puertas {white-space: pre-wrap; font-family: var(--font-mono); margin: 0 0 .5em; overflow-wrap: anywhere}
.puertas span {background: rgb(46 160 67 / calc(var(--g) * .8)); border-radius: 2px}
.puertas .r {outline: 2px solid #e8710a} .puertas .r::after {content: "R"; color: #e8710a; font-size: .7em}
.leyenda {font-size: .85em; opacity: .85; margin: .3em 0}
.leido {font-size: .85em; width: auto !important} .leido td, .leido th {padding: 0 .6em !important; text-align: left}
"""
# gradio's own words are in Spanish where the browser asks for it.
IN_SPANISH = """<script>
Object.defineProperty(navigator, "language", {get: () => "es"}); document.documentElement.lang = "es";
</script>"""


# ----------------------------------------------------------------------------------------------------------------------
# What it shows
# ----------------------------------------------------------------------------------------------------------------------


def report_text(folder: Path) -> str:
    """The report of `--profundidad` with its pictures inside it."""

    def inside(found):
        picture = base64.b64encode((folder / found[2]).read_bytes()).decode()
        return f"![{found[1]}](data:image/png;base64,{picture})"

    return re.sub(r"!\[(.*?)\]\(([\w-]+\.png)\)", inside, (folder / "informe.md").read_text(encoding="utf-8"))


def about(chat: Chat, name: str) -> str:
    """What stands at the head of the page, as Markdown."""
    if is_toy(chat.model):
        size = spanish(phi_size(chat.model) / 1e6, 1)
        kind = (
            f"⚠️ Es un modelo de juguete ({size} millones de parámetros; Phi-1 tiene 1.400): imita la forma del código "
            "que ha visto, y lo que escribe no hay que creerlo. No conversa: dale el principio de una función."
        )
    else:
        kind = (
            "Es un modelo base que completa código, no un asistente: hazle preguntas directas o, mejor, elige «Código» "
            "y dale el principio de una función."
        )
    name = Path(name).name if Path(name).is_dir() else name  # nobody else needs to know where it is
    return f"# Phi con memoria Engram\n`{name}` · {about_memory(chat.model)}\n\n{kind}"


def build(first: Chat, name: str, teach=True, own_facts=True):
    """The page over a Chat, as gradio.Blocks.

    Args:
        teach: whether visitors may teach and forget.
        own_facts: every tab begins with the model's facts and has its own; else what one is told, all are.
    """
    import gradio as gr

    def drawn(messages):
        """A chatbot's messages, of which ours are HTML."""
        return [
            {**one, "content": gr.HTML(one["content"])} if isinstance(one["content"], str) else one for one in messages
        ]

    def put(visit, text):
        text, messages = ask(visit, text)
        return text, drawn(messages)

    def stream(visit, *settings):
        yield from map(drawn, answered(visit, *settings))

    known = [*first.model.facts]
    lock, one = threading.Lock(), dict(concurrency_id="modelo", concurrency_limit=1)
    quiet = dict(api_visibility="private", show_progress="minimal")
    with gr.Blocks(title="Phi con memoria Engram", analytics_enabled=False) as page:
        visit = gr.State(lambda: Visit(first, lock, known if own_facts else None), delete_callback=Visit.halt)
        gr.Markdown(about(first, name))
        with gr.Row():
            with gr.Column(scale=3, min_width=360):
                chatbot = gr.Chatbot(
                    label="Conversación", elem_id="charla", height=520, render_markdown=False, buttons=[],
                    latex_delimiters=[], allow_tags=False, placeholder="Escribe abajo y pulsa «Enviar».",
                )  # fmt: skip
                box = gr.Textbox(
                    label="Tu mensaje", lines=3, max_lines=12, autofocus=True, elem_id="mensaje",
                    placeholder="def es_primo(n):     (Mayúsculas+Intro para enviar; Intro es otra línea)",
                )  # fmt: skip
                with gr.Row():
                    send = gr.Button("Enviar", variant="primary")
                    stop = gr.Button("Parar", variant="stop")
                    clear = gr.Button("Empezar de nuevo")
            with gr.Column(scale=1, min_width=240):
                mode = gr.Radio(
                    ["Conversación", "Código"], value="Código" if first.code else "Conversación", label="Modo",
                    info="«Código» sigue lo que escribas, cada vez desde cero.",
                )  # fmt: skip
                memory = gr.Checkbox(first.memory, label="Memoria encendida", info="Apagada responde Phi sin Engram.")
                temperature = gr.Slider(
                    0, max(2, first.temperature), value=first.temperature, step=0.1, label="Temperatura",
                    info="0 elige siempre lo más probable; cuanto mayor, más variado.",
                )  # fmt: skip
                length = gr.Slider(
                    1, first.context // 2, value=first.max_tokens, step=1, label="Largo de la respuesta (tokens)"
                )
                seed = gr.Textbox(  # gradio's Number cannot be empty
                    "" if first.seed is None else str(first.seed), label="Semilla", elem_id="semilla",
                    info="Vacía: cada vez otra respuesta. Un número la repite.",
                )  # fmt: skip
        settings = [mode, memory, temperature, length, seed]
        asked = dict(fn=put, inputs=[visit, box], outputs=[box, chatbot], queue=False, api_visibility="private")
        for event in (send.click, box.submit):
            event(**asked, show_progress="hidden").then(stream, [visit, *settings], chatbot, **quiet, **one)
        stop.click(Visit.halt, visit, None, queue=False, api_visibility="private")
        for event in (clear.click, chatbot.clear):
            event(begun_again, visit, chatbot, queue=False, **quiet)

        with gr.Accordion("⚖️ Comparar: con la memoria y sin ella", open=False):
            question = gr.Textbox(
                label="Pregunta", lines=2, placeholder="Vacía: la última que hiciste.", elem_id="pregunta"
            )
            compare = gr.Button("Comparar")
            with gr.Row():
                sides = [
                    gr.Textbox(label=f"{title} la memoria", lines=6, max_lines=30, interactive=False, elem_id=id_)
                    for title, id_ in (("Con", "con"), ("Sin", "sin"))
                ]
            verdict = gr.Textbox(show_label=False, container=False, interactive=False, elem_id="veredicto")
            compare.click(compared, [visit, question, *settings], [*sides, verdict], api_visibility="private", **one)

        if teach:
            facts_panel(gr, visit, settings, dict(api_visibility="private", **one), page)
        report = Path(OUTPUT)
        if (report / "informe.md").is_file():
            with gr.Accordion("🔬 El último informe de --profundidad", open=False) as panel:
                text = gr.Markdown(elem_id="informe")
            panel.expand(lambda: report_text(report), None, text, api_visibility="private")
    page.queue(api_open=False)
    return page


def facts_panel(gr, visit, settings, words, page):
    """Teach, list and forget; `words` go with each event."""
    with gr.Accordion("✏️ Recuerdos: dile algo y lo recuerda", open=False):
        gr.Markdown(
            "Completará el principio con la respuesta, sin entrenar; en modo conversación, también cuando se lo "
            "preguntes. No le enseñes secretos."
        )
        with gr.Row():
            prompt = gr.Textbox(
                label="Principio", placeholder="La capital de Zubrowka es", info="Vacío: la última pregunta.", lines=2,
                elem_id="principio",
            )  # fmt: skip
            answer = gr.Textbox(
                label="Respuesta", placeholder="Lutz", info="Lo que tiene que venir después.", lines=2,
                elem_id="respuesta",
            )  # fmt: skip
        learn = gr.Button("Enseñar")
        told_ = gr.CheckboxGroup([], label="Lo que ha aprendido", elem_id="recuerdos")
        with gr.Row():
            forget, everything = gr.Button("Olvidar lo marcado"), gr.Button("Olvidar todo")
        note = gr.Textbox(show_label=False, container=False, interactive=False, elem_id="aprendido")

    def listed(result):
        said, text = result
        return gr.CheckboxGroup(choices=said, value=[]), text

    bar = gr.Progress()

    def teach(visit, prompt, answer, mode, memory, temperature, length, seed, progress=bar):
        def step(number):
            progress((number, STEPS))

        return listed(taught(visit, prompt, answer, step, mode, memory, temperature, length, seed))

    learn.click(teach, [visit, prompt, answer, *settings], [told_, note], **words)
    forget.click(lambda visit, said: listed(forgotten(visit, said)), [visit, told_], [told_, note], **words)
    everything.click(lambda visit: listed(forgotten(visit, visit.said)), visit, [told_, note], **words)
    page.load(lambda visit: gr.CheckboxGroup(choices=visit.said), visit, told_, queue=False, api_visibility="private")


# ----------------------------------------------------------------------------------------------------------------------
# Serving it
# ----------------------------------------------------------------------------------------------------------------------


def check_place(share: bool):
    """Before a model is opened: whether a page can be shown from here.

    Raises:
        UserError: gradio is missing or too old, or nobody could see the page.
    """
    try:
        version = importlib.metadata.version("gradio")
    except importlib.metadata.PackageNotFoundError:
        raise UserError("Para la página hace falta gradio: pip install gradio") from None
    if int(version.split(".")[0]) < 6:
        raise UserError(f"La página necesita gradio 6 o posterior, y aquí está el {version}: pip install -U gradio")
    if not share and "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
        raise UserError(
            "Kaggle no deja ver los puertos de su máquina: la página necesita --compartir, que hace un enlace público "
            "con usuario y contraseña."
        )
    if not share and "COLAB_RELEASE_TAG" in os.environ and not in_notebook():
        raise UserError(
            "En Colab, la página se abre desde una celda, sin «!»: "
            'from chat_phi_engram import main; main(["--pagina"])'
        )


def window(port: int):
    """Colab's own window on the port. Written from google.colab's documentation, and not tried in Colab."""
    from google.colab import output

    output.serve_kernel_port_as_window(port)


def launch(page, port: int | None = None, share=False):
    """Serve it on 127.0.0.1 in threads of its own. Returns (user, password) of the public link, or None.

    Raises:
        UserError: the port is taken, or no public link could be made.
    """
    login = ("engram", secrets.token_urlsafe(12)) if share else None
    printed = io.StringIO()  # what gradio says of the link, in English
    try:
        with redirect_stdout(printed):
            page.launch(
                server_name="127.0.0.1", server_port=port, share=share, auth=login, quiet=True, inline=False,
                auth_message="Usuario y contraseña: los dice la terminal de quien comparte.", prevent_thread_lock=True,
                footer_links=[], run_history=False, enable_monitoring=False, ssr_mode=False, pwa=False,
                mcp_server=False, max_file_size=1, css=CSS, head=IN_SPANISH,
            )  # fmt: skip
    except OSError as error:
        where = f"El puerto {port} está ocupado" if port else "No hay ningún puerto libre"
        raise UserError(f"{where}. Elige otro: --pagina {(port or FIRST_PORT) + 1}") from error
    if share and not page.share_url:
        page.close(verbose=False)
        raise UserError(
            f"No se ha podido hacer el enlace público ({' '.join(printed.getvalue().split())[:300]}). Comprueba la "
            "conexión, o usa la página sin --compartir."
        )
    return login


def show_page(first: Chat, name: str, port: int | None, share: bool, teach: bool, note):
    """Show the page until Ctrl-C.

    Args:
        first: a Chat whose model and settings the tabs begin with. teach: whether visitors may teach.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read while gradio is imported
    if share:
        first.teaching.folder = None  # what strangers teach is not kept
    page = build(first, name, teach, own_facts=first.teaching.folder is None)
    try:
        login = launch(page, port, share)
        note(f"Página: http://127.0.0.1:{page.server_port}   (Ctrl-C la cierra)")
        if login:
            note(
                f"Enlace público: {page.share_url}\n   Usuario: {login[0]}   Contraseña: {login[1]}\n"
                "⚠️  Pasa por los servidores de gradio.live, de un tercero, que ven lo que se escribe. Dura como mucho "
                "una semana, y menos si cierras esto. Los visitantes "
                + ("pueden enseñarle recuerdos, cada uno los suyos." if teach else "no pueden enseñarle nada.")
            )
        elif in_notebook() and "COLAB_RELEASE_TAG" in os.environ:
            window(page.server_port)
        while True:
            time.sleep(1)
    except KeyboardInterrupt:
        note("Página cerrada.")
    finally:
        page.close(verbose=False)
