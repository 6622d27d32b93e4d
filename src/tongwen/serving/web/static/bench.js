// The tabs Data, Vocabulary and Runs.
import { html, useState, useEffect } from "./preact.js";
import { api, post, upload, words, useWork, Choice, Drawn, Field, Notice, Sheet, Waiting } from "./common.js";

const SECONDS = 2; // between two views of a run

export function Data({ state }) {
  const [file, setFile] = useState("");
  const [model, setModel] = useState(state.found[0] || "");
  const [template, setTemplate] = useState(state.templates[0]);
  const [seen, setSeen] = useState(null);
  const [busy, problem, run] = useWork();
  useEffect(() => {
    if (file) run(() => post("inspect", { file, model, template }), setSeen);
  }, [file, model, template]);
  const take = (event) => {
    const [chosen] = event.target.files;
    if (chosen) run(async () => setFile((await upload(chosen)).file));
  };
  return html`<div class="columns">
    <div class="side">
      <${Field} label=${words.file}><input id="dropped" type="file" onChange=${take} /><//>
      <p class="soft">${words.deleted}</p>
      <${Choice} label=${words.tokens_of} value=${model} onChange=${setModel}
        options=${[["", words.rows_only], ...state.found]} />
      <${Choice} id="template" label=${words.template} value=${template} onChange=${setTemplate} options=${state.templates} />
    </div>
    <div class="wide" aria-busy=${busy}>
      <${Waiting} on=${busy} /><${Notice} text=${problem} />
      ${seen && html`<${Drawn} id="ledger" markup=${seen.rows} /><${Drawn} id="samples" markup=${seen.samples} />`}
    </div></div>`;
}

export function Vocabulary({ state }) {
  const [base, setBase] = useState(state.found[0] || "");
  const [other, setOther] = useState("");
  const [text, setText] = useState(state.example);
  const [seen, setSeen] = useState(null);
  const [busy, problem, run] = useWork();
  const show = () => run(() => post("vocabulary", { base, other, text }), setSeen);
  return html`<div class="row">
      <${Choice} label=${words.before} value=${base} onChange=${setBase} options=${state.found} />
      <${Choice} label=${words.after} value=${other} onChange=${setOther} options=${[["", "—"], ...state.found]} />
    </div>
    <${Field} label=${words.text}><textarea id="text" rows="4" value=${text}
      onInput=${(event) => setText(event.target.value)}></textarea><//>
    <button id="cut" class="main" disabled=${busy} onClick=${show}>${words.show_tokens}</button>
    <${Waiting} on=${busy} /><${Notice} text=${problem} />
    ${seen && html`<${Drawn} id="tokens" markup=${seen.tokens} /><${Sheet} page=${seen.report} title=${words.report} />`}`;
}

export function Runs({ state, shown }) {
  const [lists, setLists] = useState(state);
  const [recipe, setRecipe] = useState(state.recipes[0] || "");
  const [changes, setChanges] = useState("");
  const [text, setText] = useState("");
  const [name, setName] = useState(state.runs[0] || "");
  const [view, setView] = useState(null);
  const [compared, setCompared] = useState("");
  const [others, setOthers] = useState([]);
  const [busy, problem, run] = useWork();
  const [lost, setLost] = useState("");
  const look = async () => {
    try {
      setView(await api("run", { name }));
      setLost("");
    } catch (error) {
      setLost(error.message);
    }
  };
  useEffect(() => {
    setView(null);
    if (!shown || !name) return undefined;
    let over = false;
    const again = async () => {
      await look();
      if (!over) setTimeout(() => over || again(), SECONDS * 1000);
    };
    again();
    return () => (over = true);
  }, [name, shown]);
  useEffect(() => {
    if (shown) api("state").then(setLists, (error) => setLost(error.message));
  }, [shown]);
  useEffect(() => {
    if (recipe) run(() => api("recipe", { name: recipe }), (found) => setText(found.text));
  }, [recipe]);
  const start = () => run(async () => {
    const started = (await post("start", { recipe, changes })).run;
    setLists(await api("state"));
    setName(started);
  });
  const act = (action) => run(async () => {
    await post(action, { run: name });
    await look();
  });
  const compare = () => run(async () => setCompared((await post("compare", { runs: [name, ...others] })).report));
  const mark = (one) => setOthers(others.includes(one) ? others.filter((each) => each !== one) : [...others, one]);
  const rest = lists.runs.filter((one) => one !== name);
  return html`<div class="columns">
    <div class="side">
      <${Choice} id="recipe" label=${words.recipe} value=${recipe} onChange=${setRecipe} options=${lists.recipes} />
      <${Field} label=${words.changes}><textarea id="changes" rows="2" value=${changes}
        placeholder="out=runs/second sft.learning_rate=2e-4" onInput=${(event) => setChanges(event.target.value)}></textarea><//>
      <button id="start" class="main" disabled=${busy || !recipe} onClick=${start}>${words.start}</button>
      <details><summary>${words.recipe_text}</summary><pre class="code">${text}</pre></details>
    </div>
    <div class="wide">
      <div class="row"><${Choice} id="run" label=${words.run} value=${name} onChange=${setName} options=${lists.runs} />
        <button id="stop" disabled=${busy || !view?.running} onClick=${() => act("stop")}>${words.stop}</button>
        <button id="resume" disabled=${busy || !view || view.running || view.finished}
          onClick=${() => act("resume")}>${words.resume}</button></div>
      <${Waiting} on=${busy || (name && !view && !lost)} /><${Notice} text=${problem || lost} />
      ${view ? html`<${Drawn} id="picture" markup=${view.view} />` : !name && html`<p class="soft">${words.no_run}</p>`}
      ${rest.length > 0 && html`<fieldset><legend>${words.compare_with}</legend>${rest.map((one) => html`
        <label class="tick"><input type="checkbox" checked=${others.includes(one)} onChange=${() => mark(one)} /> ${one}</label>`)}
        <button id="compare" disabled=${busy || !others.length} onClick=${compare}>${words.compare}</button></fieldset>`}
      <${Sheet} page=${compared} title=${words.compare} />
    </div></div>`;
}
