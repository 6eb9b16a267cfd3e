"""OpenAI's interface for editors, over transformers' own server: one model, with its memory and its facts.

Paths, fields and streams are those of https://platform.openai.com/docs/api-reference; of transformers are the
application, the two handlers and what they write. Answers are the chat's: see `engram.conversation.Answer`.
"""

if __name__ == "__main__":
    raise SystemExit("Esta pieza no se ejecuta. Los programas: verify_, load_, train_ y chat_phi_engram.py (--help)")

import asyncio
import copy
import inspect
import json
import secrets
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from pathlib import Path

import torch

from engram.console import UserError, out_of_memory, readable
from engram.conversation import Answer, Chat, suited
from engram.facts import NoChance
from engram.graft import CHAT_TEMPLATE

try:
    import openai  # noqa: F401  # transformers' handlers need its types
    import uvicorn
    from fastapi import HTTPException
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, StreamingResponse
    from starlette.exceptions import HTTPException as HTTPError  # a path that is not there, too
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.utils import GenerationState
except ImportError as error:
    raise UserError(
        f"Para --servir falta un paquete, o el instalado es demasiado antiguo ({error}). Se arregla con:\n"
        '   pip install -U "transformers[serving]"'
    ) from error

HOST = "127.0.0.1"
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health")  # the others load and drop models
NUMBERS = {"temperature": 2, "top_p": 1, "frequency_penalty": 2}  # from 0 to this
# What would change the answer and is not done, and the value, besides none, that does not ask for it.
NOT_DONE = {
    "n": 1, "best_of": 1, "response_format": {"type": "text"}, "suffix": "", "echo": False, "logprobs": False,
    "presence_penalty": 0, "logit_bias": {}, "tools": [], "functions": [],
}  # fmt: skip
ONLY_THE_PREFIX = " Este modelo no sabe rellenar huecos: pide que siga solo lo de antes del cursor, sin «suffix»."


def problem(message: str, param=None, code=None, kind="invalid_request_error") -> dict:
    """OpenAI's error object."""
    return {"message": message, "type": kind, "param": param, "code": code}


def refused(message: str, param=None, code=None) -> HTTPException:
    return HTTPException(400, problem(message, param, code))


def explained(error: Exception) -> tuple[int, dict]:
    """HTTP status and OpenAI's error object."""
    if isinstance(error, HTTPError) and isinstance(error.detail, dict):
        return error.status_code, error.detail
    if isinstance(error, HTTPError):  # starlette's: no such path or method
        return error.status_code, problem(f"Aquí no hay eso. Se admite: {', '.join(PATHS)}.", code="not_found")
    if isinstance(error, RequestValidationError):
        return 400, problem("El cuerpo tiene que ser un objeto JSON, con la cabecera Content-Type: application/json.")
    if isinstance(error, UserError):  # of Chat.fit
        return 400, problem(str(error), "messages", "context_length_exceeded")
    if out_of_memory(error):
        torch.cuda.empty_cache()
        message = "Se agotó la RAM, o la memoria de la GPU, y esta respuesta se ha perdido. Pide un max_tokens menor."
        return 503, problem(message, code="out_of_memory", kind="server_error")
    return 500, problem(f"Error interno: {type(error).__name__}: {error}", kind="server_error")


# ----------------------------------------------------------------------------------------------------------------------
# Requests
# ----------------------------------------------------------------------------------------------------------------------


def number(body: dict, field: str, low, high, kinds=(int, float)):
    """A field's value, or None. Raises HTTPException where it is no number from `low` to `high`."""
    value = body.get(field)
    if value is not None and (isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high):
        whole = " entero" if kinds is int else ""
        raise refused(f"«{field}»: {value!r} no vale; se admite un número{whole} de {low} a {high}.", field)
    return value


def texts(body: dict, field: str) -> list[str]:
    """A field that is a text or a list of them. Raises HTTPException where it is neither."""
    value = body.get(field) or []
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise refused(f"«{field}»: se admite un texto o una lista de textos.", field)
    return value


def turns_of(messages) -> list[dict]:
    """OpenAI's messages as `Chat` has its turns. Raises HTTPException where they are not texts."""
    try:
        turns = []
        for message in messages:
            content = message["content"] or ""
            text = content if isinstance(content, str) else " ".join(part["text"] for part in content)
            turns.append({"role": str(message["role"]), "content": text})
    except (KeyError, TypeError):
        turns = []
    if not turns:
        text = "«messages»: se admite una lista de mensajes, cada uno con «role» y un texto en «content»."
        raise refused(text, "messages")
    return turns


class Endpoint:
    """/v1/completions or /v1/chat/completions: transformers' handler, and for each request a Job of its own."""

    def __init__(self, handler: type, models: "OneModel"):
        self.handler, self.models, self.code = handler, models, handler is CompletionHandler

    async def handle_request(self, body: dict, request_id: str):
        job, body = self.accept(body)
        response = await self.handler(self.models, job).handle_request(body, request_id)
        if isinstance(response, StreamingResponse):
            response.body_iterator = job.ended(response.body_iterator)
        return response

    def accept(self, body: dict) -> tuple["Job", dict]:
        """A request as it is carried out: what it asks of Job, and what it asks of transformers' handler."""
        for field, nothing in NOT_DONE.items():
            if body.get(field) and body[field] != nothing:
                hint = ONLY_THE_PREFIX if field == "suffix" else ""
                text = f"«{field}»: {body[field]!r} no se admite; quítalo.{hint}"
                raise refused(text, field, "unsupported_parameter")
        chat = copy.copy(self.models.chat)
        chat.code = self.code
        longest = number(body, "max_completion_tokens", 1, 10**9, int) or number(body, "max_tokens", 1, 10**9, int)
        chat.max_tokens = min(longest or chat.max_tokens, chat.context // 2)
        asked = {field: number(body, field, 0, high) for field, high in NUMBERS.items()}
        asked = {field: value for field, value in asked.items() if value is not None}
        temperature = asked.get("temperature", chat.temperature)
        asked["temperature"] = temperature if temperature >= 0.01 else 0  # as in Chat.plan
        if self.code:
            prompt = texts(body, "prompt")
            if len(prompt) > 1:
                raise refused("«prompt»: se admite un texto en cada petición.", "prompt")
            # OpenAI's default: the start of a document.
            asked["prompt"] = readable("".join(prompt)) or chat.tokenizer.eos_token
        else:
            asked["messages"] = chat.fit(turns_of(body.get("messages")))[1]
        seed = number(body, "seed", -(2**63), 2**63 - 1, int)
        seed = chat.ask("").seed if seed is None else seed
        job = Job(self.models, self.code, [stop for stop in texts(body, "stop") if stop], seed)
        self.models.tell_name(body.get("model"))
        stream = bool(body.get("stream"))
        return job, {**asked, "model": self.models.name, "max_tokens": chat.max_tokens, "stream": stream}


class Job(GenerationState):
    """One request's generation: to transformers' handlers their state of generation, its manager and its streamer.

    Args:
        stops: texts that end the answer and are no part of it.
    """

    def __init__(self, models: "OneModel", code: bool, stops: list[str], seed: int):
        super().__init__()
        self.models, self.code, self.stops, self.seed = models, code, stops, seed
        self.total_tokens, self.cancelled, self.failure = 0, False, None

    def get_manager(self, *_, **__) -> "Job":
        return self

    def cancel(self):
        """The client has gone: the answer ends at its next token."""
        self.cancelled = True

    def generate_streaming(self, model, tokenizer, inputs, plan, **_) -> tuple[asyncio.Queue, "Job"]:
        """Begin an answer. Its pieces come out of the queue, and then None."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()

        def tell(piece):
            with suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(queue.put_nowait, piece)

        def run():
            try:
                self.answer(inputs, plan, tell)
            except Exception as error:  # noqa: BLE001  # told to the client
                self.failure = explained(error)[1]
            tell(None)

        self.models.worker.submit(run)
        return queue, self

    async def generate_non_streaming(self, model, tokenizer, inputs, plan, **_) -> tuple[str, int, torch.LongTensor]:
        """The text, the prompt's number of tokens, the answer's tokens [T]."""
        run = asyncio.get_running_loop().run_in_executor
        answer = await run(self.models.worker, self.answer, inputs, plan, lambda piece: None)
        return answer.text, answer.prompt_length, answer.ids[0, answer.prompt_length :]

    def answer(self, inputs, plan, write) -> Answer:
        """Answer, in the one thread that does, and leave in `inputs` what there was room for."""

        def show(piece):
            if self.cancelled or self.models.closing:
                raise HTTPException(503, problem("El servidor se está cerrando.", code="closing", kind="server_error"))
            if piece:
                write(piece)

        show("")  # it may have waited for long
        chat = self.models.chat
        ids = inputs["input_ids"] = inputs["input_ids"][:, plan.max_new_tokens - chat.context :]
        answer = Answer(chat.tokenizer, ids, self.code, show, stops=self.stops)
        torch.manual_seed(self.seed % 2**63)
        chat.model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=plan, stopping_criteria=[answer],
            logits_processor=[NoChance(chat.model)],
        )  # fmt: skip
        answer.finish()
        self.total_tokens = answer.ids.shape[1] - answer.prompt_length
        return answer

    async def ended(self, pieces):
        """A stream, to its end as OpenAI has it: "[DONE]", and before it what went wrong."""
        async with aclosing(pieces):
            async for piece in pieces:
                if self.failure is None:
                    yield piece
        if self.failure is not None:
            yield f"data: {json.dumps({'error': self.failure})}\n\n"
        yield "data: [DONE]\n\n"


# ----------------------------------------------------------------------------------------------------------------------
# The server
# ----------------------------------------------------------------------------------------------------------------------


class OneModel(ModelManager):
    """What transformers' server asks of its models, where there is one and it is open."""

    def __init__(self, name: str, chat: Chat, note):
        self.name, self.chat, self.note, self.force_model = name, chat, note, None
        self.worker = ThreadPoolExecutor(1)  # one answer at a time, the others in order
        self.closing = self.told = False

    def process_model_name(self, name: str) -> str:
        return name

    def load_model_and_processor(self, *_, **__):
        return self.chat.model, self.chat.tokenizer

    def list_models(self, *_, **__) -> list[dict]:
        return [{"id": self.name, "object": "model", "created": 0, "owned_by": "local"}]

    get_gen_models = list_models  # its name until transformers 5.22

    def shutdown(self):
        self.closing = True
        self.worker.shutdown(wait=False, cancel_futures=True)

    def tell_name(self, asked):
        """An editor that asks for another model is answered by this one; where the server runs, it is said once."""
        if asked and asked != self.name and not self.told:
            self.told = True
            self.note(f"(Piden el modelo «{asked}»; responde «{self.name}», el único que hay.)")


class Server(uvicorn.Server):
    models: OneModel

    def handle_exit(self, sig, frame):
        self.models.closing = True  # what is being answered ends at its next token
        super().handle_exit(sig, frame)


def make_app(models: OneModel, key: str | None):
    """transformers' application with our two endpoints, our errors, and nothing that loads or drops a model."""
    parts = dict.fromkeys(inspect.signature(build_server).parameters)
    parts["model_manager"], parts["generation_state"] = models, GenerationState()
    parts["chat_handler"] = Endpoint(ChatCompletionHandler, models)
    parts["completion_handler"] = Endpoint(CompletionHandler, models)
    app = build_server(**parts)
    app.router.routes[:] = [route for route in app.router.routes if route.path in PATHS]

    @app.middleware("http")
    async def guard(request, call_next):
        if request.url.hostname not in (HOST, "localhost"):  # a page that calls itself by our address
            text = f"Se admite solo http://{HOST} o http://localhost, no «{request.url.hostname}»."
            return JSONResponse({"error": problem(text)}, 403)
        given = request.headers.get("authorization", "").encode("latin-1")
        if key and not secrets.compare_digest(given, f"Bearer {key}".encode()):
            text = "Falta la llave, o no es esta. Va en la cabecera «Authorization: Bearer LLAVE» (apiKey)."
            return JSONResponse({"error": problem(text, code="invalid_api_key")}, 401)
        return await call_next(request)

    async def fail(request, error):
        status, what = explained(error)
        if status >= 500:
            models.note(f"❌ {what['message']}")
        return JSONResponse({"error": what}, status)

    for kind in (HTTPError, RequestValidationError, UserError, Exception):
        app.add_exception_handler(kind, fail)
    return app


def serve(
    model, tokenizer, name, port, note, key=None, max_tokens=256, temperature=None, seed=None, kept_in=None
):  # fmt: skip
    """Serve until Ctrl-C, to this machine alone.

    Args:
        name: folder or Hub name that the model was opened from; clients see its last part, or the Hub name.
        port: 0 takes any that is free.
        note: takes each sentence for whoever started it.
        key: what every request has to send as `Authorization: Bearer`; None: nothing.
        max_tokens, temperature, seed: where a request does not say.
        kept_in: folder of what the model was taught in the chat.
    Raises:
        UserError: the port is taken.
    """
    chat = Chat(model, tokenizer, True, max_tokens, 1.0, seed, kept_in)
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    tokenizer.clean_up_tokenization_spaces = False
    model.generation_config = chat.plan()  # sampled, which a request's temperature 0 undoes
    chat.temperature = suited(model, False, temperature)[1]
    path = Path(name).expanduser()
    models = OneModel(path.resolve().name if path.is_dir() else str(name), chat, note)
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise UserError(
                f"--servir {port}: ese puerto está ocupado o no se puede usar. Elige otro, del 1024 al 65535, o 0 para "
                "uno que esté libre."
            ) from error
        listening.listen()
        address = f"http://{HOST}:{listening.getsockname()[1]}/v1"
        guarded = "con llave" if key else "sin llave"
        note(f"Sirviendo «{models.name}» en {address} (interfaz de OpenAI, {guarded}). Ctrl-C lo cierra.")
        config = uvicorn.Config(make_app(models, key), log_level="critical", timeout_graceful_shutdown=5)
        server = Server(config)
        server.models = models
        with suppress(KeyboardInterrupt):  # uvicorn raises it once more when it has ended
            server.run(sockets=[listening])
    models.shutdown()
    note("Servidor cerrado.")
