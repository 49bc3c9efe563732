"""The look of the page: system font, one column, light and dark by the reader's setting."""

CSS = """
:root { color-scheme: light dark; --paper: #fbfbfa; --panel: #ffffff; --ink: #1d2126; --soft: #626a73; --line: #dfe2e5;
  --good: #1a7f4b; --bad: #c0302b; --note: #fff6dd;
  --series-1: #2563b8; --series-2: #d9722b; --series-3: #2a8f6d; --series-4: #8a4fb0; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --panel: #1c2024; --ink: #e6e8ea; --soft: #9aa3ac;
  --line: #363c42; --good: #5ccb92; --bad: #ff7b72; --note: #33300f;
  --series-1: #6ea8fe; --series-2: #f5a35c; --series-3: #5fd0a5; --series-4: #c79bf2; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0.5rem 0 1.2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 0.8rem; }
p { margin: 0.2rem 0; }
aside { background: var(--note); border: 1px solid var(--line); border-radius: 8px; padding: 0.6rem 1rem;
  margin-bottom: 1.2rem; }
.cards { display: grid; gap: 0.8rem; grid-template-columns: repeat(auto-fit, minmax(min(10rem, 100%), 1fr)); }
.card { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 0.8rem 1rem; }
.card span, .card small { display: block; color: var(--soft); font-size: 0.85rem; }
.card strong { display: block; font-size: 1.6rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.pass, .card.pass strong { color: var(--good); }
.fail, .card.fail strong { color: var(--bad); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 0.4rem 0.8rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { color: var(--soft); font-weight: 500; font-size: 0.9rem; }
tbody th { font-weight: 400; white-space: normal; min-width: 9rem; }
.figures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr));
  margin-bottom: 1.2rem; }
figure { margin: 0; background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 0.8rem; }
figure svg { display: block; width: 100%; height: auto; max-width: 38rem; margin: 0 auto; }
svg text { font-family: system-ui, sans-serif; }
@media (min-width: 62rem) { .cards { grid-template-columns: repeat(3, 1fr); } }
figcaption { color: var(--soft); font-size: 0.85rem; margin-top: 0.4rem; }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: 0.2rem 1rem; margin: 0.6rem 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
details { border-top: 1px solid var(--line); padding: 0.5rem 0; margin-top: 0.5rem; }
summary { cursor: pointer; }
pre { overflow-x: auto; font-size: 0.85rem; background: var(--panel); border: 1px solid var(--line);
  border-radius: 8px; padding: 0.8rem; }
@media (max-width: 34rem) {
  th, td { padding: 0.35rem 0.4rem; font-size: 0.85rem; } thead th { white-space: normal; font-size: 0.8rem; }
  tbody th { min-width: 5rem; } .card { padding: 0.6rem 0.8rem; } .card strong { font-size: 1.35rem; }
  dl { grid-template-columns: 1fr; } dd { margin-bottom: 0.4rem; }
}
"""
