// Reads an open page again when the server says that something changed, and says when it cannot know.
// The page's own script says what to do with the page as it is now: `live(merge)`, merge(document).

"use strict";

const SILENT_MS = 45_000; // the server says something every 20 s
const AGE_MS = 1_000;

function live(merge) {
  const sign = document.getElementById("live");
  let source = null;
  let silence = null;
  let reading = false;
  let again = false;

  function say(state, text) {
    if (sign.dataset.state === state) return;
    sign.dataset.state = state;
    sign.textContent = text;
    sign.hidden = false;
  }

  function lost() {
    say("lost", "Connection lost: what you see may be out of date. Trying again…");
  }

  async function readAgain() {
    if (reading) {
      again = true;
      return;
    }
    reading = true;
    try {
      const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      if (!answer.ok && answer.status !== 403) throw new Error(answer.status);
      if (!page.getElementById("live")) {
        source.close();
        clearTimeout(silence);
        say("ended", "You are logged out, or may not see this any more. Load the page again.");
        return;
      }
      merge(page);
      ages();
      say("live", "Live: changes show at once.");
    } catch {
      lost();
      again = false;
      setTimeout(readAgain, 2_000);
    } finally {
      reading = false;
    }
    if (again) {
      again = false;
      readAgain();
    }
  }

  function heard() {
    clearTimeout(silence);
    silence = setTimeout(connect, SILENT_MS);
  }

  function connect() {
    if (source) {
      source.close();
      lost();
    }
    source = new ReconnectingEventSource(sign.dataset.url);
    source.onerror = lost;
    // What happened before the stream was open, nobody told.
    source.addEventListener("stream-open", () => {
      heard();
      readAgain();
    });
    // Two facts may be stored in another order than they are seen: nobody waits for more than this.
    source.addEventListener("keep-alive", () => {
      heard();
      readAgain();
    });
    source.addEventListener("changed", () => {
      heard();
      readAgain();
    });
    source.addEventListener("stream-error", readAgain);
    heard();
  }

  function ages() {
    for (const time of document.querySelectorAll("time[data-age]")) {
      const text = age(Date.now() - Date.parse(time.dateTime));
      if (time.textContent !== text) time.textContent = text;
    }
  }

  ages();
  setInterval(ages, AGE_MS);
  connect();
}

function age(milliseconds) {
  const seconds = Math.max(0, Math.floor(milliseconds / 1_000));
  if (seconds < 60) return `${seconds} s`;
  if (seconds < 3_600) return `${Math.floor(seconds / 60)} min ${seconds % 60} s`;
  if (seconds < 86_400) return `${Math.floor(seconds / 3_600)} h ${Math.floor((seconds % 3_600) / 60)} min`;
  return `${Math.floor(seconds / 86_400)} d ${Math.floor((seconds % 86_400) / 3_600)} h`;
}
