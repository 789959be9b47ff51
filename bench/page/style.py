"""How a report looks: colours by role for light and dark, and one style sheet. No fonts, pictures or scripts to fetch.

The same roles colour text, cards and plots, so everything follows the reader's choice of light or dark at once. Text
has a contrast of at least 4.5 to its ground in both, lines in plots at least 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

LIGHT: Final[Mapping[str, str]] = {
    "ink": "#171a21",
    "muted": "#59616f",
    "line": "#dfe2e8",
    "page": "#f6f7f9",
    "surface": "#ffffff",
    "band": "#e6e4fc",
    "ours": "#4338ca",
    "reference": "#6b7280",
    "s1": "#b45309",
    "s2": "#0e7490",
    "s3": "#be185d",
    "s4": "#4d7c0f",
    "s5": "#7c3aed",
    "s6": "#1d4ed8",
    "s7": "#b91c1c",
}
DARK: Final[Mapping[str, str]] = {
    "ink": "#e8eaee",
    "muted": "#a4acb9",
    "line": "#2c323c",
    "page": "#0e1116",
    "surface": "#161a21",
    "band": "#2b2a55",
    "ours": "#a5a0ff",
    "reference": "#9098a6",
    "s1": "#f0a04b",
    "s2": "#4cc3dc",
    "s3": "#f58cc0",
    "s4": "#a6d35a",
    "s5": "#c9a7ff",
    "s6": "#7fb0ff",
    "s7": "#ff8b8b",
}


def style_sheet() -> str:
    def roles(palette: Mapping[str, str]) -> str:
        return "".join(f"--{role}:{colour};" for role, colour in palette.items())

    return (
        f":root{{color-scheme:light dark;{roles(LIGHT)}}}\n"
        f"@media (prefers-color-scheme:dark){{:root{{{roles(DARK)}}}}}\n{_RULES}"
        # Paper is white, whatever the screen was.
        f"@media print{{:root{{color-scheme:light;{roles({**LIGHT, 'page': '#ffffff'})}}}{_PRINT}}}\n"
    )


_RULES: Final = """\
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth;scroll-padding-top:1rem}
body{margin:0;background:var(--page);color:var(--ink);font:400 1rem/1.6 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue","Liberation Sans",Arial,sans-serif;overflow-wrap:anywhere}
header,main,footer{max-width:70rem;margin:0 auto;padding:0 clamp(1rem,4vw,2.5rem)}
header{padding-top:clamp(2rem,6vw,4rem)}
h1,h2,h3{line-height:1.2;letter-spacing:-.015em;text-wrap:balance;margin:0}
h1{font-size:clamp(1.9rem,1.3rem + 2.6vw,3rem);font-weight:700;letter-spacing:-.03em}
h2{font-size:clamp(1.4rem,1.15rem + 1vw,1.85rem);font-weight:680}
h3{font-size:1.15rem;font-weight:650}
h4{font-size:1rem;font-weight:650;margin:1.75rem 0 .5rem}
h4.first{margin-top:.2rem}
p{margin:.6rem 0 0;max-width:46rem;text-wrap:pretty}
a{color:var(--ours);text-underline-offset:.2em}
a:focus-visible,summary:focus-visible,.scroll:focus-visible{outline:2px solid var(--ours);outline-offset:2px;
border-radius:.3rem}
code{font:.9em ui-monospace,"SFMono-Regular",Menlo,"Liberation Mono","DejaVu Sans Mono",monospace}
pre{margin:.75rem 0 0;padding:.9rem 1.1rem;background:var(--surface);border:1px solid var(--line);border-radius:.7rem;
white-space:pre-wrap;overflow-wrap:anywhere}
strong{font-weight:650}
.brand{display:flex;align-items:center;gap:.7rem;margin-bottom:1.1rem;font-weight:650;color:var(--muted)}
.brand svg{width:5.5rem;height:.75rem;flex:none}
.lede{font-size:clamp(1.05rem,1rem + .3vw,1.2rem);color:var(--muted);margin-top:.9rem}
.lede strong{color:var(--ink)}
nav{margin-top:1.5rem}
nav ul{display:flex;flex-wrap:wrap;gap:.45rem;margin:0;padding:0;list-style:none}
nav a{display:block;padding:.3rem .8rem;border:1px solid var(--line);border-radius:99px;background:var(--surface);
color:var(--ink);text-decoration:none;font-size:.9rem}
nav a:hover{border-color:var(--ours);color:var(--ours)}
main>section{margin-top:clamp(2.5rem,6vw,4rem)}
main>section>section{margin-top:clamp(2.25rem,5vw,3.25rem)}
.class{padding-top:1.75rem;border-top:2px solid var(--ink)}
.facts{color:var(--muted);font-size:.92rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,15.5rem),1fr));gap:.9rem;margin-top:1.5rem}
.card{background:var(--surface);border:1px solid var(--line);border-radius:.9rem;padding:1.1rem 1.25rem 1.2rem}
.card b{display:block;font-size:clamp(2.2rem,1.9rem + 1.2vw,2.9rem);line-height:1.1;font-weight:700;
letter-spacing:-.04em;color:var(--ours);font-variant-numeric:tabular-nums}
.card span{display:block;font-weight:600;margin-top:.3rem;line-height:1.35}
.card small{display:block;margin-top:.35rem;color:var(--muted);font-size:.87rem;line-height:1.45}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,24rem),1fr));gap:.9rem;margin-top:1.1rem}
figure{margin:0;background:var(--surface);border:1px solid var(--line);border-radius:.9rem;padding:1rem 1rem .9rem;
min-width:0}
figcaption{font-weight:620;line-height:1.35;padding:0 .15rem .5rem}
figcaption small{display:block;font-weight:400;color:var(--muted);font-size:.86rem}
figure .plot{display:block;width:100%;max-width:32rem;height:auto;margin:0 auto;stroke-linejoin:round}
.plot text{font-family:inherit!important}
.legend{display:flex;flex-wrap:wrap;gap:.3rem 1.1rem;margin:.55rem 0 0;padding:0 .15rem;list-style:none;
font-size:.85rem;color:var(--muted)}
.legend li{display:flex;align-items:center;gap:.45rem}
.legend svg{width:1.7rem;height:.8rem;flex:none}
.legend .mine{color:var(--ink);font-weight:620}
.shared{margin-top:.9rem}
.scroll{overflow-x:auto;margin-top:.9rem;background:var(--surface);border:1px solid var(--line);border-radius:.9rem;
-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;width:100%;font-size:.9rem;line-height:1.4;font-variant-numeric:tabular-nums}
th,td{padding:.5rem .85rem;text-align:left;vertical-align:baseline;border-top:1px solid var(--line);
overflow-wrap:normal;min-width:max-content}
td:not(.n){min-width:8rem}
tr:first-child>*{border-top:0}thead+tbody tr:first-child>*{border-top:1px solid var(--line)}
thead th{color:var(--muted);font-weight:600;font-size:.82rem;white-space:nowrap;vertical-align:bottom}
tbody th{font-weight:550;min-width:7.5rem}tbody th.n{min-width:0}
.n{text-align:right;white-space:nowrap}
.why{min-width:16rem;overflow-wrap:anywhere}
.marked{background:color-mix(in srgb,var(--ours) 9%,transparent)}
.marked th,.marked td{font-weight:650}
.badge{display:inline-block;padding:.05rem .55rem;border-radius:99px;border:1px solid currentColor;font-size:.8rem;
font-weight:600;white-space:nowrap}
.absent,.skipped{color:var(--muted)}.wrong,.failed{color:var(--s7)}
.missing{margin-top:1.1rem;padding:.9rem 1.15rem;border:1px dashed var(--reference);border-radius:.9rem;
color:var(--muted);max-width:none}
.plots .missing{margin:0;align-self:start}
.tables{gap:0 1.5rem}.tables>div{min-width:0}
.missing strong{color:var(--ink)}
details{margin-top:.4rem}
summary{cursor:pointer;padding:.6rem .2rem;font-weight:600}
summary small{font-weight:400;color:var(--muted);margin-left:.4rem}
details .scroll{margin-top:.2rem}
footer{margin-top:4rem;padding-bottom:3rem;color:var(--muted);font-size:.9rem}
footer p{border-top:1px solid var(--line);padding-top:1.2rem;max-width:none}
@media (prefers-reduced-motion:reduce){html{scroll-behavior:auto}}
@media (max-width:30rem){.brand{font-size:.92rem}.brand svg{width:4.2rem}
figure{padding:.8rem .55rem .75rem}th,td{padding:.45rem .65rem}}
"""
_PRINT: Final = """\
body{font-size:10pt}nav{display:none}
header,main,footer{max-width:none;padding-left:0;padding-right:0}
figure,.card,tr,pre,.missing{break-inside:avoid}h2,h3,h4,summary{break-after:avoid}
.plots{grid-template-columns:1fr 1fr}.scroll{overflow:visible}
th,td{padding:.25rem .5rem}
details::details-content{content-visibility:visible;block-size:auto;opacity:1}
"""
