// The chat: one model, or two that answer the same question. Conversations stay in this browser.
import { html, useState, useEffect, useRef } from "./preact.js";
import { events, words, Choice, Field, Notice } from "./common.js";
import { Answer } from "./answer.js";

const SLIDERS = [["temperature", 0, 2, 0.05], ["top_p", 0.05, 1, 0.05], ["top_k", 0, 200, 1], ["repetition_penalty", 1, 2, 0.01]];
const MAX_TOKENS = 4096;
const KEPT = "tongwen.chats";
const MOST = 50; // conversations that are kept

function stored() {
  try {
    const found = JSON.parse(localStorage.getItem(KEPT));
    return Array.isArray(found) ? found : [];
  } catch {
    return [];
  }
}

const title = (boards) => (boards[0].find((turn) => turn.role === "user")?.content || "").replace(/\s+/g, " ").trim().slice(0, 24);
// What the model gets: without notes, and without questions that got no answer but the last one.
const sent = (board) => board.filter((turn) => turn.content && !turn.waiting).map(({ role, content }) => ({ role, content }));

export function Chat({ state }) {
  const [models, setModels] = useState([state.chosen[0] || state.models[0], state.chosen[1] || state.models[1] || state.models[0]]);
  const [beside, setBeside] = useState(state.chosen.length > 1);
  const [boards, setBoards] = useState([[], []]);
  const [system, setSystem] = useState(state.system);
  const [sampling, setSampling] = useState(state.sampling);
  const [question, setQuestion] = useState("");
  const [chats, setChats] = useState(stored);
  const [number, setNumber] = useState(0);
  const [answering, setAnswering] = useState(null);
  const box = useRef(null);

  const keep = (changed) => {
    setChats(changed);
    try {
      localStorage.setItem(KEPT, JSON.stringify(changed));
    } catch {
      // without storage, a conversation lasts as long as the page
    }
  };

  const answer = async (asked) => {
    const stop = new AbortController();
    setAnswering(stop);
    const shown = asked.map((board, side) => (side === 0 || beside ? [...board, { role: "assistant", content: "", waiting: true }] : board));
    const draw = () => setBoards([...shown]);
    draw();
    await Promise.all(shown.slice(0, beside ? 2 : 1).map(async (board, side) => {
      const put = (change) => {
        const last = shown[side].at(-1);
        shown[side] = [...shown[side].slice(0, -1), { ...last, ...change(last) }];
        draw();
      };
      try {
        const body = { model: models[side], system, messages: sent(board), sampling };
        for await (const event of events("chat", body, stop.signal)) {
          put((last) => (event.text ? { content: last.content + event.text } : { pace: event.pace, problem: event.problem }));
        }
      } catch (error) {
        if (error.name !== "AbortError") put(() => ({ problem: error.message }));
      }
      put(() => ({ waiting: false }));
    }));
    setAnswering(null);
    const kept = number || Date.now();
    setNumber(kept);
    keep([{ number: kept, title: title(shown), system, boards: shown }, ...chats.filter((one) => one.number !== kept)].slice(0, MOST));
    box.current?.focus();
  };

  const ask = (text) => answer(boards.map((board, side) => (side === 0 || beside ? [...board, { role: "user", content: text }] : board)));
  const submit = () => {
    if (!question.trim() || answering) return;
    setQuestion("");
    ask(question);
  };
  const retry = () => answer(boards.map((board) => board.slice(0, board.findLastIndex((turn) => turn.role === "user") + 1)));
  const mend = (place, text) => answer(boards.map((board, side) => (side === 0 || beside ? [...board.slice(0, place), { role: "user", content: text }] : board)));
  const fresh = () => {
    setBoards([[], []]);
    setNumber(0);
    box.current?.focus();
  };
  const open = (chosen) => {
    const chat = chats.find((one) => String(one.number) === chosen);
    if (!chat) return fresh();
    setBoards(chat.boards);
    setSystem(chat.system);
    return setNumber(chat.number);
  };
  const drop = () => {
    keep(chats.filter((one) => one.number !== number));
    fresh();
  };

  return html`<div class="chat">
    <div class="talk">
      <div class=${beside ? "boards two" : "boards"}>
        ${boards.slice(0, beside ? 2 : 1).map((board, side) => html`<${Board} key=${side} side=${side} board=${board} busy=${answering}
          models=${state.models} model=${models[side]} retry=${retry} mend=${mend}
          setModel=${(name) => setModels(models.map((one, place) => (place === side ? name : one)))} />`)}
      </div>
      <form class="ask" onSubmit=${(event) => { event.preventDefault(); submit(); }}>
        <textarea id="question" ref=${box} rows="2" aria-label=${words.ask} placeholder=${words.ask} value=${question}
          onInput=${(event) => setQuestion(event.target.value)}
          onKeyDown=${(event) => { if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); submit(); } }}></textarea>
        ${answering
          ? html`<button type="button" id="halt" onClick=${() => answering.abort()}>${words.stop}</button>`
          : html`<button type="submit" id="send" class="main" disabled=${!question.trim()}>${words.send}</button>`}
      </form>
    </div>
    <aside class="side">
      <${Choice} id="conversations" label=${words.conversations} value=${String(number)} onChange=${open} disabled=${answering}
        options=${[["0", words.new], ...chats.map((one) => [String(one.number), one.title])]} />
      <div class="row"><button id="fresh" disabled=${answering} onClick=${fresh}>${words.new}</button>
        ${number > 0 && html`<button disabled=${answering} onClick=${drop}>${words.delete}</button>`}</div>
      ${number > 0 && !answering && html`<${Export} boards=${boards.slice(0, beside ? 2 : 1)} system=${system} />`}
      ${state.models.length > 1 && html`<label class="tick"><input id="beside" type="checkbox" checked=${beside} disabled=${answering}
        onChange=${() => setBeside(!beside)} /> ${words.side_by_side}</label>`}
      <${Field} label=${words.system}><textarea id="system" rows="3" value=${system} onInput=${(event) => setSystem(event.target.value)}></textarea><//>
      <${Settings} presets=${state.presets} sampling=${sampling} setSampling=${setSampling} />
    </aside></div>`;
}

function Board({ side, board, busy, models, model, setModel, retry, mend }) {
  const place = useRef(null);
  const near = useRef(true); // whether the reader is at the end, and wants to stay there
  useEffect(() => {
    if (near.current) place.current.scrollTop = place.current.scrollHeight;
  }, [board]);
  const scrolled = () => {
    const { scrollHeight, scrollTop, clientHeight } = place.current;
    near.current = scrollHeight - scrollTop - clientHeight < 40;
  };
  const last = board.at(-1);
  return html`<div class="column">
    ${models.length > 1 && html`<${Choice} id=${`model${side}`} label=${side ? words.second_model : words.model} value=${model} options=${models} onChange=${setModel} disabled=${busy} />`}
    <div class="board" id=${`board${side}`} ref=${place} onScroll=${scrolled} role="log" tabindex="0" aria-label=${model} aria-busy=${Boolean(busy)}>
      ${board.length === 0 && html`<p class="soft welcome">${words.welcome}</p>`}
      ${board.map((turn, index) => turn.role === "user"
        ? html`<${Question} key=${index} text=${turn.content} busy=${busy} mend=${(text) => mend(index, text)} />`
        : html`<${Answer} key=${index} turn=${turn} />`)}
    </div>
    <div class="under"><span class="soft pace" id=${`pace${side}`}>${last?.pace || ""}</span>
      ${last && last.role === "assistant" && !busy && html`<span><button class="plain" onClick=${() => navigator.clipboard.writeText(last.content)}>${words.copy}</button>
        <button class="plain retry" onClick=${retry}>${words.retry}</button></span>`}</div></div>`;
}

function Question({ text, busy, mend }) {
  const [draft, setDraft] = useState(null);
  if (draft === null) {
    return html`<div class="turn mine"><div class="said">${text}</div>
      ${!busy && html`<button class="plain edit" onClick=${() => setDraft(text)}>${words.edit}</button>`}</div>`;
  }
  const done = () => {
    setDraft(null);
    if (draft.trim()) mend(draft);
  };
  return html`<div class="turn mine"><textarea class="draft" rows="3" aria-label=${words.edit} value=${draft} onInput=${(event) => setDraft(event.target.value)}></textarea>
    <div><button onClick=${() => setDraft(null)}>${words.cancel}</button> <button class="main" onClick=${done}>${words.send}</button></div></div>`;
}

function Settings({ presets, sampling, setSampling }) {
  const set = (name, value) => setSampling({ ...sampling, [name]: value });
  const names = Object.keys(presets);
  const chosen = names.find((name) => Object.entries(presets[name]).every(([key, value]) => sampling[key] === value));
  return html`<details><summary>${words.sampling}</summary>
    <fieldset><legend>${words.preset}</legend>${names.map((name) => html`<label class="tick">
      <input type="radio" name="preset" checked=${chosen === name} onChange=${() => setSampling({ ...sampling, ...presets[name] })} /> ${words[name]}</label>`)}</fieldset>
    ${[["max_new_tokens", 1, MAX_TOKENS, 1], ...SLIDERS].map(([name, low, high, step]) => html`
      <${Field} label=${`${words[name] || name.replace("_", "-")}: ${sampling[name]}`}><input type="range" min=${low} max=${high} step=${step} value=${sampling[name]}
        onInput=${(event) => set(name, Number(event.target.value))} /><//>`)}
    <${Field} label=${words.seed}><input type="number" min="0" max="2147483647" step="1" value=${sampling.seed ?? ""}
      onInput=${(event) => event.target.validity.valid && set("seed", event.target.value === "" ? null : Number(event.target.value))} /><//></details>`;
}

function Export({ boards, system }) {
  const messages = (board) => [...(system.trim() ? [{ role: "system", content: system }] : []), ...sent(board)];
  const headings = { user: words.question, assistant: words.answer, system: words.system_name };
  const markdown = (board) => messages(board).map((one) => `## ${headings[one.role]}\n\n${one.content}`).join("\n\n") + "\n";
  const json = (board) => JSON.stringify({ messages: messages(board) }, null, 1);
  const save = (name, text) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text]));
    link.download = name;
    link.click();
    URL.revokeObjectURL(link.href);
  };
  return html`<div id="export" class="row" role="group" aria-label=${words.export}>${boards.map((board, side) => {
    const name = side ? "chat-2" : "chat";
    return html`<button class="plain" onClick=${() => save(`${name}.md`, markdown(board))}>${name}.md</button>
      <button class="plain" onClick=${() => save(`${name}.json`, json(board))}>${name}.json</button>`;
  })}</div>`;
}
