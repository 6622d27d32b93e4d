// What all tabs share: requests, fields, problems.
import { html, useRef, useState } from "./preact.js";

export const language = location.pathname.split("/")[1];
export const words = {}; // the texts of the page, from its state

const address = (name, query) => `/${language}/api/${name}${query ? "?" + new URLSearchParams(query) : ""}`;

async function checked(asked) {
  let answer;
  try {
    answer = await asked;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error(words.lost || String(error));
  }
  if (answer.ok) return answer;
  const text = await answer.text();
  let problem = text;
  try {
    problem = JSON.parse(text).problem;
  } catch {
    // it is the text of the gate
  }
  throw new Error(problem);
}

export async function api(name, query) {
  const found = await (await checked(fetch(address(name, query)))).json();
  if (name === "state") Object.assign(words, found.texts);
  return found;
}

export async function post(name, body) {
  const headers = { "content-type": "application/json" };
  return (await checked(fetch(address(name), { method: "POST", headers, body: JSON.stringify(body) }))).json();
}

export async function upload(file) {
  return (await checked(fetch(address("upload", { name: file.name }), { method: "POST", body: file }))).json();
}

// The events of an answer, one after the other.
export async function* events(name, body, signal) {
  const headers = { "content-type": "application/json" };
  const answer = await checked(fetch(address(name), { method: "POST", headers, body: JSON.stringify(body), signal }));
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) yield JSON.parse(part.slice(6));
  }
}

// [whether it works, the problem, run]: run does something, hands over its result, and keeps its problem until the next
// try. What was asked before the latest try comes too late and is dropped.
export function useWork() {
  const [busy, setBusy] = useState(false);
  const [problem, setProblem] = useState("");
  const tries = useRef(0);
  const run = async (work, put = () => {}) => {
    const mine = ++tries.current;
    setBusy(true);
    setProblem("");
    try {
      const found = await work();
      if (mine === tries.current) put(found);
    } catch (error) {
      if (mine === tries.current) setProblem(error.message);
    }
    if (mine === tries.current) setBusy(false);
  };
  return [busy, problem, run, setProblem];
}

export const Notice = ({ text, onClose }) => text && html`
  <div class="notice" role="alert"><span>${text}</span>${onClose && html`
    <button class="plain" aria-label=${words.close} onClick=${onClose}>×</button>`}</div>`;

export const Waiting = ({ on }) => html`<p class="soft waiting" role="status">${on ? words.waiting : ""}</p>`;

export const Field = ({ label, children }) => html`<label class="field"><span>${label}</span>${children}</label>`;

export const Choice = ({ label, value, options, onChange, ...more }) => html`
  <${Field} label=${label}><select value=${value} onChange=${(event) => onChange(event.target.value)} ...${more}>
    ${options.map((one) => {
      const [key, name] = Array.isArray(one) ? one : [one, one];
      return html`<option value=${key} selected=${key === value}>${name}</option>`;
    })}</select><//>`;

// HTML of the server's own templates, which have escaped every value.
export const Drawn = ({ markup, ...more }) => html`<div class="ours" ...${more} dangerouslySetInnerHTML=${{ __html: markup }}></div>`;

// A whole page of the server's, in which no script runs.
export const Sheet = ({ page, title }) => page && html`<iframe class="sheet" sandbox="" srcdoc=${page} title=${title}></iframe>`;
