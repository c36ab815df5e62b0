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
POLICY = """<meta http-equiv="Content-Security-Policy" content="default-src 'none';
  connect-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'unsafe-inline';
  img-src 'self' data:; media-src 'self'; base-uri 'none'; form-action 'none';
  require-trusted-types-for 'script'; trusted-types 'none'">"""


def put(text: str, place: str, page: str) -> str:
    """Return `page` with `text` in place of what a regular expression finds once."""
    page, count = re.subn(place, lambda _: text, page)
    if count != 1:
        raise ValueError(f"chat.html has not one place for {place}")
    return page


def chat_page(page: str, max_file: int) -> str:
    """Return chat.html with media.js, and with the policy that this needs."""
    script = f'<script type="module" src="media.js" data-max="{max_file}"></script>'
    page = put(POLICY, "<!-- policy -->\\s*<meta [^>]*>", page)
    return put(script, "<!-- scripts -->", page)


def call_page() -> str:
    """Return call.html with the colours of chat.html."""
    colours = re.search(r":root \{.*?\n\}", CHAT.read_text("utf-8"), re.DOTALL)
    if not colours:
        raise ValueError("chat.html has no colours, :root { … }")
    return put(colours[0], r"/\* colours \*/", (HERE / "call.html").read_text("utf-8"))


@web.middleware
async def add_script(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Add media.js to the page. The lists of users have the same address, but no place."""
    response = await handler(request)
    if isinstance(response, web.Response) and response.content_type == "text/html":
        page, max_file = response.text or "", request.app[files.FILES].max_file
        is_page = "<!-- scripts -->" in page
        response.text = chat_page(page, max_file) if is_page else page
    return response


async def asset(request: web.Request) -> web.StreamResponse:
    """Answer with the page of a call, or with one of the two scripts."""
    headers = {"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}
    if request.path in ("/media.js", "/call.js"):
        return web.FileResponse(HERE / request.path[1:], headers=headers)
    return web.Response(text=call_page(), content_type="text/html", headers=headers)


def make_app(
    stored: files.Files, ice: calls.Servers, app: web.Application | None = None
) -> web.Application:
    """Return the chat, or that of cluster.py, with files and calls; or raise ValueError."""
    app = chat.make_app() if app is None else app
    chat_page(CHAT.read_text("utf-8"), 0)
    call_page()
    app.middlewares.append(add_script)
    app[files.FILES] = stored
    app.add_routes(files.ROUTES)
    calls.add_to(app, ice)
    for path in "/media.js", "/call.js", "/call/{id}":
        app.router.add_get(path, asset)
    return app


def main() -> None:
    """Serve until Ctrl-C or SIGTERM."""
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
            limits = (
                2**20 * mebibytes for mebibytes in (args.max_file, args.max_total)
            )
            stored = files.Files(Path(args.files or temporary), *limits)
            app = None
            if args.redis:
                import cluster  # needs redis-py, which nobody else does

                app = cluster.make_app(args.redis, args.name)
            app = make_app(stored, args.ice, app)
        except (ImportError, OSError, ValueError) as error:
            sys.exit(f"media.py: {error}")
        chat.serve(app, args.host, args.port)


if __name__ == "__main__":
    main()
