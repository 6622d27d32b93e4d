// An answer of a model: Markdown in which HTML is text, thinking folded, no picture and no script link.
import { html } from "./preact.js";
import MarkdownIt from "./markdown-it.js";
import { words, Notice } from "./common.js";

const markdown = new MarkdownIt({ html: false, linkify: false, breaks: true }).disable("image");
markdown.renderer.rules.link_open = (tokens, index, options, env, self) => {
  tokens[index].attrSet("target", "_blank");
  tokens[index].attrSet("rel", "noopener noreferrer");
  return self.renderToken(tokens, index, options);
};
markdown.validateLink = (url) => /^https?:\/\//i.test(url);

// [thinking, answer]; the mark that ends the thinking may not have come yet.
export function split(text) {
  const begin = text.match(/^\s*<think>/);
  if (!begin) return ["", text];
  const [thinking, ...rest] = text.slice(begin[0].length).split("</think>");
  return [thinking.trim(), rest.join("</think>")];
}

export function Answer({ turn }) {
  const [thinking, said] = split(turn.content);
  return html`<div class="turn bot">
    ${thinking && html`<details><summary>${words.reasoning}</summary><div class="thinking">${thinking}</div></details>`}
    <div class="said prose" dangerouslySetInnerHTML=${{ __html: markdown.render(said) }}></div>
    ${turn.waiting && !turn.content && html`<p class="soft waiting" role="status">${words.waiting}</p>`}
    <${Notice} text=${turn.problem && `${words.no_answer}: ${turn.problem}`} /></div>`;
}
