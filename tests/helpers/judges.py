"""Judges for tests: a tiny chat model, and a stand-in for a server that speaks OpenAI's protocol."""

import copy
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from helpers.models import sharpen

TEMPLATE = "{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}<|assistant|>"


def save_judge(tokenizer, folder, template=TEMPLATE):
    """Saves a tiny chat model of random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = Qwen2Config(vocab_size=len(tokenizer), **sizes, **heads, eos_token_id=tokenizer.eos_token_id)
    sharpen(Qwen2ForCausalLM(config)).save_pretrained(folder)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


class JudgeServer:
    """
    `with JudgeServer(say) as server:` answers each prompt by `say(prompt)`; an exception there becomes a 500. It notes
    what it was asked.

    `url` is its address, `asked` the bodies of the requests, and `keys` what they brought as `Authorization`.
    """

    def __init__(self, say):
        self.say, self.asked, self.keys = say, [], []

    def __enter__(self):
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append(body)
                outer.keys.append(self.headers["Authorization"])
                try:
                    message = {"role": "assistant", "content": outer.say(body["messages"][0]["content"])}
                    status = 200 if self.path == "/v1/chat/completions" else 404
                    choice = {"index": 0, "finish_reason": "stop", "message": message}
                    said = {"id": "1", "created": 0, "model": body["model"], "object": "", "choices": [choice]}
                except Exception as error:
                    status, said = 500, {"error": str(error)}
                content = json.dumps(said).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()
