// What media.py adds to chat.html: files, calls and notifications. It works as a user would:
// it puts a link into the message box and submits the form, and sees messages in the log.

const PICTURES = /\.(png|jpe?g|gif|webp|avif|bmp|ico)$/i;
const SOUNDS = /\.(mp3|m4a|aac|og[ga]|opus|wav|flac)$/i;
const FILMS = /\.(mp4|m4v|webm|ogv|mov)$/i;
const { login, name, log, write, message, send } =
  Object.fromEntries(Array.from(document.querySelectorAll("[id]"), (tag) => [tag.id, tag]));

document.head.append(element("style", {}, `
#write { flex-wrap: wrap; }
#extras { display: flex; flex-direction: column; gap: .25rem; }
#extras button, #uploads button { padding: .1rem .6rem; }
#uploads { flex: 100%; max-height: 30vh; margin: 0; padding: 0; overflow: auto; list-style: none; }
#uploads:empty { display: none; }
#uploads li { display: flex; align-items: center; gap: .5rem; padding: .15rem; }
#uploads span { flex: 1; }
#uploads [role=alert] { color: var(--bad); }
progress { flex: 2; min-width: 4rem; accent-color: var(--accent); }
#notify { flex: none; width: auto; min-width: 0; margin: 0; accent-color: var(--accent); }
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

function button(text, onclick) {
  return Object.assign(element("button", { type: "button" }, text), { onclick });
}

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

// Files: one after the other, so that they are said in their order

const uploads = element("ul", { id: "uploads", "aria-label": "Uploads" });
let last = Promise.resolve();

function attach(files) {
  for (const file of files) {
    const request = new XMLHttpRequest(); // fetch() does not tell how far an upload is
    const bar = element("progress", { value: 0, "aria-label": file.name });
    const row = element("li", {}, element("span", {}, file.name), bar, button("Cancel", () => {
      row.remove();
      request.abort();
    }));
    uploads.append(row);
    last = last.then(() => row.isConnected && upload(file, request, bar)).then(() => row.remove());
  }
}

async function upload(file, request, bar) {
  request.upload.onprogress = ({ loaded, total }) => {
    bar.value = loaded / total;
  };
  request.open("POST", `files?${new URLSearchParams({ user: name.value, name: file.name })}`);
  request.send(file);
  await new Promise((done) => {
    request.onloadend = done;
  });
  const text = request.responseText;
  if (request.status === 201) say(new URL(`.${text}`, location).href);
  else if (request.getResponseHeader("Content-Type")?.startsWith("text/plain")) complain(`${file.name}: ${text}`);
  else if (bar.isConnected) complain(`${file.name}: the upload failed, status ${request.status}`);
}

function complain(text) {
  const row = element("li", {}, element("span", { role: "alert" }, text), button("Dismiss", () => row.remove()));
  uploads.append(row);
}

const picker = element("input", { type: "file", multiple: "", hidden: "", "aria-label": "Files" });
picker.onchange = () => {
  attach([...picker.files]);
  picker.value = ""; // so that the same file may be picked again
};

document.addEventListener("paste", (event) => {
  const { files, types } = event.clipboardData;
  const isText = types.includes("text/plain") && types.includes("text/html"); // with a picture of it
  if (!files.length || isText) return;
  event.preventDefault();
  attach([...files]);
});

for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault(); // else the browser would leave the page for the file
    document.body.classList.toggle("dropping", kind === "dragover");
    if (kind === "drop") attach([...event.dataTransfer.files]);
  });
}

// Calls

function call() {
  if (send.disabled) return complain("Log in first: calls are for who is in the room");
  const path = `call/${crypto.getRandomValues(new BigUint64Array(2)).join("-")}`;
  say(new URL(path, location).href);
  open(path, "_blank", "noopener"); // to wait there for the others
}

write.prepend(uploads, element("div", { id: "extras" }, button("Attach", () => picker.click()), button("Call", call)), picker);

// Pictures and players, in place of links to this server's files

const folder = new URL("files/", location).href;

function illustrate() {
  for (const link of log.querySelectorAll(`a[href^="${folder}"]:not(.file)`)) {
    link.classList.add("file");
    const escaped = link.href.split("/").at(-1).replaceAll("+", "%2B");
    const file = new URLSearchParams(`=${escaped}`).get(""); // as decodeURIComponent, but never fails
    link.textContent = file;
    const source = { src: link.href, "aria-label": file, controls: "", preload: "none" };
    if (PICTURES.test(file)) link.replaceChildren(element("img", { src: link.href, alt: file, loading: "lazy" }));
    else if (SOUNDS.test(file)) link.after(element("audio", source));
    else if (FILMS.test(file)) link.after(element("video", source));
  }
}

// Notifications

const notify = element("input", { id: "notify", type: "checkbox", role: "switch", "aria-describedby": "notify-state" });
const state = element("span", { id: "notify-state", role: "status" });
let supported = "Notification" in window;
let note = null; // the notification that is shown
let missed = 0; // messages since the tab is hidden ...
let latest = null; // ... and the last of them
let timer = 0; // of the next notification
login.after(element("label", { title: "Show messages that come while this tab is hidden" }, notify, " Notify"), state);

function showState() {
  let remembered = "";
  try {
    remembered = localStorage.getItem("notify");
  } catch { /* a browser may forbid it */ }
  const permission = supported ? Notification.permission : "unsupported";
  notify.disabled = !supported;
  notify.checked = remembered === "on" && permission === "granted";
  state.textContent = { granted: notify.checked ? "on" : "off", default: "off" }[permission] ?? permission;
}

notify.onchange = async () => {
  const wanted = notify.checked;
  if (wanted) await Notification.requestPermission(); // "denied" where a page is not from https:
  try {
    localStorage.setItem("notify", wanted ? "on" : "off");
  } catch { /* then it is not remembered */ }
  showState();
};

function showMissed() {
  timer = 0;
  if (!missed) return; // the tab is looked at again
  const [author, text] = ["b", "p"].map((tag) => latest.querySelector(tag).textContent.slice(0, 200));
  const more = missed > 1 ? ` and ${missed - 1} more` : "";
  try {
    note = new Notification(author + more, { body: text, tag: "chat" }); // in place of the one before
    note.onclick = () => window.focus();
  } catch { // Chromium on Android has the name but not the thing
    supported = false;
    showState();
  }
}

document.addEventListener("visibilitychange", () => {
  note?.close();
  missed = 0;
  showState(); // the browser's settings may be others now
});

new MutationObserver((changes) => {
  illustrate();
  if (!document.hidden || !notify.checked) return;
  const added = changes.flatMap(({ addedNodes }) => [...addedNodes]);
  const others = added.filter((entry) => entry.parentNode === log && entry.className !== "own");
  if (!others.length) return;
  missed += others.length;
  latest = others.at(-1);
  timer ||= setTimeout(showMissed, 500);
}).observe(log, { childList: true, subtree: true });

window.requestAnimationFrame = (draw) => setTimeout(draw, 16); // a hidden tab has no frames
showState();
illustrate();
