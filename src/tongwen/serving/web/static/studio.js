// The page: a tab for each part that the server offers.
import { html, render, useState, useEffect } from "./preact.js";
import { api, language, Notice } from "./common.js";
import { Chat } from "./chat.js";
import { Data, Vocabulary, Runs } from "./bench.js";

const PARTS = { chat: Chat, data: Data, vocabulary: Vocabulary, runs: Runs };

function Studio({ state }) {
  const { tabs, texts, title } = state;
  const [open, setOpen] = useState(tabs.includes(location.hash.slice(1)) ? location.hash.slice(1) : tabs[0]);
  const choose = (name) => {
    history.replaceState(null, "", `#${name}`);
    setOpen(name);
  };
  const move = (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = tabs[(tabs.indexOf(open) + step + tabs.length) % tabs.length];
    choose(next);
    document.getElementById(`tab-${next}`).focus();
  };
  const other = language === "zh" ? "en" : "zh";
  return html`
    <header>
      <h1>${title}</h1>
      ${tabs.length > 1 && html`<div role="tablist" onKeyDown=${move}>${tabs.map((name) => html`
        <button role="tab" id=${`tab-${name}`} aria-controls=${`part-${name}`} aria-selected=${open === name}
          tabindex=${open === name ? 0 : -1} onClick=${() => choose(name)}>${texts[name]}</button>`)}</div>`}
      <a class="tongue" href=${`/${other}/`} hreflang=${other} lang=${other}>${state.languages[other]}</a>
    </header>
    <main>${tabs.map((name) => html`
      <section key=${name} id=${`part-${name}`} role=${tabs.length > 1 ? "tabpanel" : "region"}
        aria-label=${texts[name]} hidden=${open !== name}>
        <${PARTS[name]} state=${state} shown=${open === name} />
      </section>`)}</main>`;
}

function Opening() {
  const [state, setState] = useState(null);
  const [problem, setProblem] = useState("");
  useEffect(() => {
    api("state").then(setState, (error) => setProblem(error.message));
  }, []);
  if (problem) return html`<main><${Notice} text=${problem} /></main>`;
  return state ? html`<${Studio} state=${state} />` : html`<main><p class="soft" role="status">…</p></main>`;
}

render(html`<${Opening} />`, document.body);
