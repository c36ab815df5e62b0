// What media.py adds to chat.html: files, calls and notifications. It works as a user would:
// it puts a link into the message box and submits the form; and it hears what is said.

const PICTURES = /\.(png|jpe?g|jfif|gif|webp|avif|bmp|ico)$/i;
const SOUNDS = /\.(mp3|m4a|aac|og[ga]|opus|wav|flac)$/i;
const FILMS = /\.(mp4|m4v|webm|ogv|mov)$/i;
const MAX_FILE = Number(document.querySelector("[data-max]").dataset.max); // bytes
const { login, name, key, log, write, message, send } =
  Object.fromEntries(Array.from(document.querySelectorAll("[id]"), (tag) => [tag.id, tag]));

document.head.append(element("style", {}, `
#write { flex-wrap: wrap; }
#extras { display: flex; flex-direction: column; gap: .25rem; }
#extras button, #uploads button { padding: .1rem .6rem; }
#uploads { flex: 100%; max-height: 30vh; padding: 0; overflow: auto; list-style: none; }
#uploads:empty { display: none; }
#uploads li { display: flex; align-items: center; gap: .5rem; padding: .15rem; }
#uploads span { flex: 1; overflow-wrap: anywhere; }
#uploads [role=alert] { color: var(--bad); }
progress { flex: 2; min-width: 4rem; accent-color: var(--accent); }
#notify { flex: none; width: auto; min-width: 0; accent-color: var(--accent); }
#notify-state { min-width: 2rem; color: var(--soft); }
#log :is(img, audio, video) { display: block; max-width: 100%; max-height: 16rem; margin-top: .25rem; border-radius: .5rem; }
#log audio { width: 20rem; height: 2.5rem; }
.dropping { outline: 3px dashed var(--accent); outline-offset: -6px; }
`));

function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  made.append(...children);
  return made;
}

const button = (text, onclick) => Object.assign(element("button", { type: "button" }, text), { onclick });

function say(link) {
  const { value, selectionStart, selectionEnd } = message;
  const focused = document.activeElement;
  message.value = link;
  write.requestSubmit();
  const said = message.value === "";
  message.value = said ? value : `${value} ${link}`; // else for when the connection is back
  message.setSelectionRange(selectionStart, selectionEnd);
  message.blur(); // a phone shows its keyboard only to who writes
  focused.focus();
}

// Send something to an address of this server, with the proof of who one is.
function post(request, path, body, query = {}) {
  request.open("POST", `${path}?${new URLSearchParams({ user: name.value, key: key.value, ...query })}`);
  request.send(body);
  return new Promise((done) => request.addEventListener("loadend", done));
}

// Files: one after the other, so that they are said in their order

const uploads = element("ul", { id: "uploads", "aria-label": "Uploads" });
let last = Promise.resolve();

function attach(file) {
  const request = new XMLHttpRequest(); // fetch() does not tell how far an upload is
  const bar = element("progress", { value: 0, "aria-label": file.name });
  const row = element("li", {}, element("span", {}, file.name), bar, button("Cancel", () => {
    row.remove();
    request.abort();
  }));
  uploads.append(row);
  last = last.then(() => row.isConnected && upload(file, request, bar)).then((why) => {
    if (why && row.isConnected) complain(`${file.name}: ${why}`);
    row.remove();
  });
}

// Upload a file and say its link; return why it cannot be, if so.
async function upload(file, request, bar) {
  if (file.size > MAX_FILE) return `The file is too large: ${MAX_FILE / 2 ** 20} MiB at most`;
  const start = await file.slice(0, 1).arrayBuffer().catch(() => null);
  if (!start) return "This is a folder, or a file that cannot be read";
  request.upload.onprogress = ({ loaded, total }) => bar.setAttribute("value", loaded / total);
  await post(request, "files", file, { name: file.name });
  if (request.status === 201) return say(new URL(`.${request.responseText}`, location).href);
  if (request.getResponseHeader("Content-Type")?.startsWith("text/plain")) return request.responseText;
  return request.status ? `The upload failed, status ${request.status}` : "The connection is lost";
}

function complain(text) {
  const dismiss = button("Dismiss", () => dismiss.parentElement.remove());
  uploads.append(element("li", {}, element("span", { role: "alert" }, text), dismiss));
}

const picker = element("input", { type: "file", multiple: "", hidden: "", "aria-label": "Files" });
picker.onchange = () => {
  [...picker.files].forEach(attach);
  picker.value = ""; // so that the same file may be picked again
};

document.addEventListener("paste", (event) => {
  const { files, types } = event.clipboardData;
  const isText = types.includes("text/plain") && types.includes("text/html"); // with a picture of it
  if (!files.length || isText) return;
  event.preventDefault();
  [...files].forEach(attach);
});

for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault(); // else the browser would leave the page for the file
    document.body.classList.toggle("dropping", kind === "dragover");
    if (kind === "drop") [...event.dataTransfer.files].forEach(attach);
  });
}

// Calls

async function call() {
  if (send.disabled) return complain("Log in first: calls are for who is in the room");
  const request = new XMLHttpRequest();
  await post(request, "calls");
  if (request.status !== 201) return complain(request.responseText || "The server does not answer");
  const { href } = new URL(`.${request.responseText}`, location);
  say(href);
  open(href, "_blank", "noopener"); // to wait there for the others
}

write.prepend(uploads, element("div", { id: "extras" }, button("Attach", () => picker.click()), button("Call", call)), picker);

// What a link stands for, if it is one to a file or a call of this server, and to nothing else:
// of "files/../?x#.png", a browser would ask for "?x".

const HERE = new URL(".", location).href;

function meaning(href) {
  const [, kind, rest] = /^(files\/[\w-]{24}|call)\/([^/?#]+)$/.exec(href.startsWith(HERE) ? href.slice(HERE.length) : "") ?? [];
  if (kind === "call") return { text: "Join the call" };
  if (!kind) return null;
  const name = new URLSearchParams(`=${rest.replaceAll("+", "%2B")}`).get(""); // decodeURIComponent() may fail
  const text = name.replace(/[^\P{C}\u200c\u200d]/gu, ""); // U+202E would show exe.gpj as jpg.exe
  const shown = Object.entries({ img: PICTURES, audio: SOUNDS, video: FILMS }).find(([, names]) => names.test(text));
  return { text, tag: shown?.[0] };
}

// Films show their first picture, but only those that one sees are asked for it.
const seen = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) if (isIntersecting) target.preload = "metadata";
});

function illustrate() {
  for (const link of log.querySelectorAll("a:not(.known)")) {
    link.classList.add("known");
    const { text, tag } = meaning(link.href) ?? {};
    if (!text) continue;
    link.textContent = text;
    if (tag === "img") link.replaceChildren(element(tag, { src: link.href, alt: text, loading: "lazy" }));
    else if (tag) {
      const player = element(tag, { src: link.href, "aria-label": text, controls: "", preload: "none" });
      link.after(player);
      if (tag === "video") seen.observe(player);
    }
  }
}

new MutationObserver(illustrate).observe(log, { childList: true, subtree: true });
illustrate();

// Notifications

const notify = element("input", { id: "notify", type: "checkbox", role: "switch", "aria-describedby": "notify-state" });
const state = element("span", { id: "notify-state", role: "status" });
let supported = "Notification" in window;
let note = null; // the notification that is shown
let missed = []; // messages since the tab is hidden
let timer = 0; // of the next notification
let memory = {};
try {
  memory = localStorage;
} catch { /* a browser may forbid it */ }
login.after(element("label", { title: "Show messages that come while this tab is hidden" }, notify, " Notify"), state);

function showState() {
  const permission = supported ? Notification.permission : "unsupported";
  notify.disabled = !supported;
  notify.checked = memory.notify === "on" && permission === "granted";
  state.textContent = { granted: notify.checked ? "on" : "off", default: "off" }[permission] ?? permission;
}

notify.onchange = async () => {
  memory.notify = notify.checked ? "on" : "off";
  if (notify.checked) await Notification.requestPermission(); // "denied" where a page is not from https:
  showState();
};

document.addEventListener("heard", ({ detail: { author, text, replayed } }) => {
  if (!document.hidden || !notify.checked || replayed || author === name.value) return;
  missed.push({ author, text });
  timer ||= setTimeout(showMissed, 500); // milliseconds
});

function showMissed() {
  timer = 0;
  if (!missed.length) return; // the tab is looked at again
  const { author, text } = missed.at(-1);
  const more = missed.length > 1 ? ` and ${missed.length - 1} more` : "";
  const body = (meaning(text)?.text ?? text).slice(0, 200);
  try {
    note = new Notification(author + more, { body, tag: "chat" }); // in place of the one before
    note.onclick = () => window.focus();
  } catch { // Chromium on Android has the name but not the thing
    supported = false;
    showState();
  }
}

document.addEventListener("visibilitychange", () => {
  note?.close();
  missed = [];
  showState(); // the browser's settings may be others now
});
showState();
