# /// script
# requires-python = ">=3.11"
# dependencies = ["aiohttp>=3.14.4,<4"]
# ///
"""The chat with files, notifications and calls: `python bonus/media.py`.

A file or a call is a link said in the room, so chat.py and its protocol stay as they are.
files.py and calls.py add their routes; media.js adds what one sees to the chat's page.
"""

import re
import sys
import tempfile
from pathlib import Path

from aiohttp import web
from aiohttp.typedefs import Handler

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import calls
import files

import chat

CHAT = HERE.parent / "chat.html"


def chat_page(page: str, max_file: int) -> str:
    """Return chat.html with media.js, and all that this may load; or raise ValueError."""
    script = f'<script type="module" src="media.js" data-max="{max_file}"></script>'
    for place in "<!-- policy -->", "<!-- scripts -->":
        if page.count(place) != 1:
            raise ValueError(f"chat.html has not one place for {place}")
    start, _, rest = page.partition("<!-- policy -->")
    policy, end, rest = rest.partition(">")
    policy = policy.replace("script-src ", "script-src 'self' ")
    policy = policy.replace("img-src data:", "img-src 'self' data:; media-src 'self'")
    return start + policy + end + rest.replace("<!-- scripts -->", script)


@web.middleware
async def add_script(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Add media.js to the page. The lists of users have the same address, but no place."""
    response = await handler(request)
    if isinstance(response, web.Response) and response.content_type == "text/html":
        page = response.text or ""
        if "<!-- scripts -->" in page:
            response.text = chat_page(page, request.app[files.FILES].max_file)
    return response


async def asset(request: web.Request) -> web.StreamResponse:
    """Answer with one of the two scripts, or the page of a call in chat.html's colours."""
    headers = {"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}
    if request.path in ("/media.js", "/call.js"):
        return web.FileResponse(HERE / request.path[1:], headers=headers)
    [colours] = re.findall(r":root \{.*?\n\}", CHAT.read_text("utf-8"), re.DOTALL)
    page = (HERE / "call.html").read_text("utf-8").replace("/* colours */", colours)
    return web.Response(text=page, content_type="text/html", headers=headers)


def add_to(app: web.Application, stored: files.Files, ice: calls.Servers) -> None:
    """Give the chat, or that of cluster.py, files and calls; or raise ValueError."""
    chat_page(CHAT.read_text("utf-8"), 0)
    app.middlewares.append(add_script)
    app[files.FILES], app[calls.CALLS], app[calls.ICE] = stored, calls.Calls(), ice
    assets = [web.get(path, asset) for path in ("/media.js", "/call.js", "/call/{id}")]
    app.add_routes([*files.ROUTES, *calls.ROUTES, *assets])


if __name__ == "__main__":
    parser = chat.options("The chat with files, notifications and calls")
    add = parser.add_argument
    add("--max-file", default=25, type=int, help="MiB; default: %(default)s")
    add("--max-total", default=1024, type=int, help="MiB; default: %(default)s")
    add("--files", help="a folder; default: one that goes when the server does")
    servers = "stun:HOST or turn:HOST?secret=SECRET; may be repeated"
    add("--ice", default=[], type=calls.ice_server, action="append", help=servers)
    add("--redis", help="its URL, for one chat in several processes, as in cluster.py")
    add("--name", default="chat", help="the stream's, as in cluster.py; default: chat")
    args = parser.parse_args()
    if args.redis and not args.files:
        parser.error("--redis needs --files, a folder that all processes share")
    with tempfile.TemporaryDirectory(prefix="chat-") as temporary:
        try:
            sizes = chat.MIB * args.max_file, chat.MIB * args.max_total
            stored = files.Files(Path(args.files or temporary), *sizes)
            app = chat.make_app()
            if args.redis:
                import cluster  # needs redis-py, which nobody else does

                app = cluster.make_app(args.redis, args.name)
            add_to(app, stored, args.ice)
        except (ImportError, OSError, ValueError) as error:
            sys.exit(f"media.py: {error}")
        chat.serve(app, args.host, args.port)
