// The page of a call: the server (calls.py) introduces the members to one another, and sound
// and picture go from page to page.

const PICTURE = { width: { ideal: 640 }, height: { ideal: 360 } }; // of a camera
const UPLOAD = 2_500_000; // bits a second of picture, which all who get it share
const LOUD = 0.02; // level of sound from which on somebody speaks; 1 is the loudest
const { status, notice, login, name, join, tiles, news, mute, camera, share, choice, audio, video, leave } =
  Object.fromEntries(Array.from(document.querySelectorAll("[id]"), (tag) => [tag.id, tag]));
const key = crypto.getRandomValues(new BigUint64Array(2)).join("-"); // to come back as the same member
const devices = navigator.mediaDevices; // only for a page from https: or localhost
const peers = new Map(); // the other members by ID
let memory = {};
try {
  memory = localStorage;
} catch { /* a browser may forbid it */ }

// Joining, and staying in

let socket = null; // to the server
let joined = false; // from the first introduction to leaving
let myId = "";
let myTile = null;
let ice = []; // the servers to ask for a way to the others
let asked = 0; // when the question was asked that has no answer yet
let tries = 0; // to come back, since the last success
let timer = 0; // of the next try

login.onsubmit = async (event) => {
  event.preventDefault();
  const mine = own;
  memory.user = name.value = name.value.trim();
  join.disabled = true;
  note(devices ? "" : NO_DEVICES);
  if (devices) await turnOn("audio", "video");
  if (own === mine) connect(); // else the page was left meanwhile
};

function connect() {
  const query = new URLSearchParams({ user: name.value, key });
  socket = new WebSocket(new URL(`${location.pathname}/ws?${query}`, location.href.replace(/^http/, "ws")));
  socket.onmessage = ({ data }) => hear(JSON.parse(data));
  socket.onclose = ({ reason }) => lose(reason);
  asked = Date.now();
}

function disconnect() {
  clearTimeout(timer);
  if (socket) socket.onmessage = socket.onclose = null; // what it still delivers is not listened to
  socket?.close();
  socket = null;
  asked = 0;
}

function lose(reason) {
  disconnect();
  if (!joined) return end(`Not in the call: ${reason || "the server does not answer"}`);
  for (const peer of peers.values()) peer.listed = false;
  show("Coming back …", "The connection to the server is lost, those who are here stay.");
  timer = setTimeout(connect, Math.min(10_000, 500 * 2 ** tries++) * (1 - Math.random() / 2));
}

// A way that goes dark closes nothing, and JavaScript sees no pings: so the page asks.
setInterval(() => {
  if (asked && Date.now() - asked > 8000) lose("");
  else if (!asked && socket?.readyState === WebSocket.OPEN) {
    socket.send(new Uint8Array(1));
    asked = Date.now();
  }
}, 3000); // milliseconds
addEventListener("online", () => joined && lose("")); // another network

function hear(said) {
  asked = 0;
  if (Array.isArray(said)) {
    const [from, kind, content] = said;
    const peer = peers.get(from);
    // What fails is an answer or a candidate for what is over, or nonsense.
    if (kind === "description") peer?.receive(content).catch(() => {});
    else peer?.pc.addIceCandidate(content).catch(() => {});
    return;
  }
  ({ id: myId, ice } = said);
  if (!joined) {
    joined = true;
    myTile = new Tile(`${name.value} (you)`);
    myTile.video.muted = true;
    show("In the call", notice.textContent);
    showOwn();
    listDevices();
    stayAwake();
    (devices ? mute : myTile.press).focus();
  } else if (tries) show("In the call", "");
  tries = 0;
  for (const id in said.members) {
    if (id !== myId && !peers.has(id)) peers.set(id, new Peer(id, said.members[id]));
  }
  for (const peer of peers.values()) {
    const before = peer.listed;
    peer.listed = peer.id in said.members;
    if (!before || !peer.listed) peer.mend();
    peer.send();
  }
}

function end(why) {
  disconnect();
  joined = false;
  tries = 0;
  for (const { pc } of peers.values()) pc.close();
  peers.clear();
  for (const kind in own) own[kind].stop();
  own = {};
  tiles.replaceChildren();
  news.replaceChildren();
  awake?.release();
  awake = null;
  show("Not in the call", why);
  name.focus();
}

leave.onclick = () => end("");
addEventListener("pagehide", () => end("")); // so that the others know at once

function show(text, more) {
  status.textContent = text;
  status.classList.toggle("online", text === "In the call");
  note(more);
  login.hidden = joined;
  for (const tag of [tiles, mute, camera, choice, leave]) tag.hidden = !joined;
  share.hidden = !joined || !devices?.getDisplayMedia; // phones have none
  join.disabled = joined;
}

function note(text) {
  if (notice.textContent !== text) notice.textContent = text; // else it would be read out again
}

let awake = null; // the lock that keeps the screen from going dark

async function stayAwake() {
  if (!joined || document.hidden) return;
  awake = await navigator.wakeLock?.request("screen").catch(() => null);
}
document.addEventListener("visibilitychange", stayAwake); // a hidden page has lost it

// Connections: "perfect negotiation", https://www.w3.org/TR/webrtc/#perfect-negotiation-example
// Either end may offer at any time; if both do so at once, the polite one yields.

const NO_WAY = "a network between you may block calls. Who runs this server can name a relay that helps, with --ice.";

class Peer {
  constructor(id, name) {
    const pc = new RTCPeerConnection({ iceServers: ice });
    Object.assign(this, { id, name, pc, tile: new Tile(name), senders: {}, state: {} });
    this.polite = id < myId;
    this.met = false; // before, the impolite one makes an offer
    this.offering = this.answering = false;
    this.listed = true; // as a member that the server knows
    this.spoke = 0; // when it was last heard to speak
    this.waited = 0; // for a connection, in quarters of a second
    this.lost = false; // no way to it is found
    pc.ontrack = ({ streams: [srcObject] }) => Object.assign(this.tile.video, { srcObject });
    pc.onicecandidate = ({ candidate }) => candidate && this.tell("candidate", candidate);
    pc.onnegotiationneeded = async () => {
      if (this.polite && !this.met) return;
      this.offering = true;
      await pc.setLocalDescription().catch(() => {}); // closed meanwhile
      this.offering = false;
      this.tell("description", pc.localDescription);
    };
    pc.onconnectionstatechange = () => pc.connectionState === "failed" && this.mend();
    // Over this channel goes who is muted; and when the other one leaves, it closes at once.
    this.channel = pc.createDataChannel("", { negotiated: true, id: 0 });
    this.channel.onopen = () => this.send();
    this.channel.onmessage = ({ data }) => {
      this.state = JSON.parse(data) ?? {}; // nonsense throws, and so changes nothing
    };
    this.channel.onclose = () => this.remove();
    news.append(element("p", {}, `${name} is here`));
  }

  tell(kind, content) {
    if (socket?.readyState === WebSocket.OPEN) socket.send(JSON.stringify([this.id, kind, content]));
  }

  async receive(description) {
    this.met = true;
    const isOffer = description.type === "offer";
    const ready = !this.offering && (this.pc.signalingState === "stable" || this.answering);
    if (isOffer && !ready && !this.polite) return;
    this.answering = !isOffer;
    await this.pc.setRemoteDescription(description).finally(() => {
      this.answering = false;
    });
    if (!isOffer) return;
    await this.pc.setLocalDescription();
    this.tell("description", this.pc.localDescription);
  }

  // With a connection, one stays in the call even while the way to the server is lost.
  mend() {
    const { connectionState, signalingState, localDescription } = this.pc;
    if (connectionState === "connected") return;
    if (!this.listed) {
      if (connectionState !== "disconnected") this.remove();
    } else if (signalingState === "have-local-offer") {
      this.tell("description", localDescription); // it may be lost
    } else {
      this.pc.setConfiguration({ iceServers: ice });
      this.pc.restartIce();
    }
  }

  remove() {
    if (!peers.delete(this.id)) return;
    this.pc.close();
    this.tile.item.remove();
    news.append(element("p", {}, `${this.name} left`));
  }

  // Send one's own sound and picture, and what there is to know about them.
  send() {
    const tracks = { audio: own.audio, video: own.screen ?? own.video };
    for (const kind in tracks) {
      if (this.senders[kind]) this.senders[kind].replaceTrack(tracks[kind] ?? null).catch(() => {});
      else if (tracks[kind]) this.senders[kind] = this.pc.addTrack(tracks[kind], stream);
    }
    const parameters = this.senders.video?.getParameters();
    if (parameters?.encodings?.length) {
      parameters.encodings[0].maxBitrate = Math.floor(UPLOAD / peers.size);
      this.senders.video.setParameters(parameters).catch(() => {});
    }
    if (this.channel.readyState === "open") this.channel.send(JSON.stringify(ownState()));
  }

  show() {
    const sounds = this.pc.getReceivers().filter(({ track }) => track.kind === "audio");
    const level = Math.max(...sounds.flatMap((sound) => sound.getSynchronizationSources()).map(({ audioLevel }) => audioLevel));
    if (level > LOUD) this.spoke = Date.now();
    const waiting = this.pc.connectionState !== "connected";
    this.waited = waiting ? this.waited + 1 : 0; // a count, since the time of sleep is none
    const lost = this.waited > 80; // that is 20 seconds
    if (lost !== this.lost) note(lost ? `No way to ${this.name} was found: ${NO_WAY}` : "");
    this.lost = lost;
    const { muted, dark, screen } = this.state;
    this.tile.show({
      "no way found": lost, "connecting …": waiting && !lost, muted, "camera off": dark,
      screen, speaking: Date.now() - this.spoke < 1000,
    }, waiting || dark);
  }
}

setInterval(() => peers.forEach((peer) => peer.show()), 250); // milliseconds

// One's own sound and picture

const NO_DEVICES = "Browsers give camera and microphone only to pages from https: or localhost. Here, you can only listen.";
const stream = new MediaStream(); // tells the others that sound and picture are one
let own = {}; // tracks: audio, video, screen

// Turn on what is not on yet; say why something is not.
async function turnOn(...kinds) {
  const mine = own; // another one from leaving on
  const why = {};
  const wish = (kind) => ({ ...(kind === "video" && PICTURE), deviceId: { exact: memory[kind] } });
  for (const wanted of new Set([kinds.join(), ...kinds])) { // both at once, for one question
    const off = wanted.split(",").filter((kind) => !own[kind]);
    if (off.join() !== wanted) continue; // it is on since the first try
    try {
      const found = await devices.getUserMedia(Object.fromEntries(off.map((kind) => [kind, wish(kind)])));
      for (const track of found.getTracks()) {
        if (own !== mine) track.stop(); // left meanwhile
        else own[track.kind] = track;
        delete why[track.kind];
        track.onended = () => { // not by a press on a button, which is no such event
          delete own[track.kind];
          const what = track.kind === "audio" ? "microphone" : "camera";
          note(`The ${what} has ended: it is unplugged, or something else has taken it.`);
          showOwn();
        };
      }
    } catch (error) {
      for (const kind of off) {
        why[kind] = error.message || error.name;
        if (error.name === "OverconstrainedError") delete memory[kind]; // the one chosen is not there
      }
    }
  }
  if (own !== mine) return;
  let text = why.audio ? `No microphone: ${why.audio}. ` : "";
  if (why.video) text += `No camera: ${why.video}. `;
  note(why.audio && why.video ? `${text}You can only listen.` : text);
}

function turnOff(kind) {
  own[kind]?.stop();
  delete own[kind];
}

for (const [button, kind] of [[mute, "audio"], [camera, "video"]]) {
  button.onclick = async () => {
    button.disabled = true; // until the browser has given the device
    if (button === mute && own.audio) own.audio.enabled = !own.audio.enabled;
    else if (own[kind]) turnOff(kind); // its light goes out
    else await turnOn(kind);
    showOwn();
  };
}

share.onclick = async () => {
  if (own.screen) turnOff("screen");
  else {
    try {
      [own.screen] = (await devices.getDisplayMedia()).getVideoTracks();
      own.screen.contentHint = "detail"; // letters, rather than motion
      own.screen.onended = share.onclick; // with the browser's own button
      if (!joined) turnOff("screen");
    } catch { /* thought better of it */ }
  }
  showOwn();
};

function ownState() {
  return { muted: !own.audio?.enabled, dark: !own.video && !own.screen, screen: Boolean(own.screen) };
}

function showOwn() {
  if (!joined) return;
  const track = own.screen ?? own.video;
  const { muted, dark, screen } = ownState();
  for (const [button, pressed] of [[mute, muted], [camera, !own.video], [share, screen]]) {
    button.setAttribute("aria-pressed", pressed);
    button.disabled = !devices;
  }
  myTile.video.srcObject = track ? new MediaStream([track]) : null;
  // As in a mirror, unless it shows what one looks at.
  myTile.item.classList.toggle("mirrored", !screen && track?.getSettings().facingMode !== "environment");
  myTile.show({ muted, "camera off": dark, screen }, dark);
  for (const peer of peers.values()) peer.send();
}

async function listDevices() {
  const all = await devices?.enumerateDevices() ?? [];
  for (const select of [audio, video]) {
    const found = all.filter(({ kind }) => kind === `${select.id}input`);
    select.replaceChildren(...found.map(({ label, deviceId }, i) => new Option(label || `Number ${i + 1}`, deviceId)));
    select.value = own[select.id]?.getSettings().deviceId ?? select.value;
    select.onchange = async () => {
      memory[select.id] = select.value;
      const before = own[select.id];
      if (!before) return; // it is off, and stays so
      turnOff(select.id); // of two cameras, a phone opens one at a time
      await turnOn(select.id);
      if (own[select.id]) own[select.id].enabled = before.enabled;
      showOwn();
    };
  }
}
devices?.addEventListener("devicechange", listDevices);

// Who is here: a tile each, which a press enlarges, with signs beside the name

function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const name in attributes) made.setAttribute(name, attributes[name]);
  made.append(...children);
  return made;
}

class Tile {
  constructor(label) {
    this.signs = element("span", {});
    this.video = element("video", { autoplay: "", playsinline: "", "aria-label": label });
    this.press = element("button", { class: "enlarge", "aria-label": `Enlarge ${label}`, "aria-pressed": false });
    this.press.onclick = () => enlarge(this.item.classList.contains("large") ? null : this.item);
    this.item = element("li", { "data-initial": [...label][0].toUpperCase() }, this.video, this.press,
      element("p", {}, element("b", { dir: "auto" }, label), this.signs));
    tiles.append(this.item);
  }

  show(signs, dark) {
    const text = Object.keys(signs).filter((sign) => signs[sign]).join(" · ");
    if (this.signs.textContent !== text) this.signs.textContent = text;
    this.item.classList.toggle("speaking", Boolean(signs.speaking));
    this.item.classList.toggle("dark", Boolean(dark));
  }
}

function enlarge(item) {
  for (const tile of tiles.children) {
    tile.classList.toggle("large", tile === item);
    tile.querySelector("button").setAttribute("aria-pressed", tile === item);
  }
}
addEventListener("keydown", ({ key }) => key === "Escape" && enlarge(null));

show("Not in the call", devices ? "" : NO_DEVICES);
name.value = memory.user ?? "";
(name.value ? join : name).focus();
