"""The style sheet of a run's page: light and dark, from a phone's width on. The colours are those of Okabe and Ito."""

STYLE = """
:root{--ink:#1c1d20;--soft:#5d6168;--paper:#fff;--panel:#f6f7f8;--line:#d9dce1;
--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#cc79a7;--c4:#b58900;--c5:#56b4e9;--c6:#6b4fa0;--c7:#555}
@media(prefers-color-scheme:dark){:root{--ink:#e8e9eb;--soft:#a3a8b0;--paper:#15171a;--panel:#1e2125;--line:#3a3f46;
--c0:#56b4e9;--c1:#f28e2b;--c2:#2cc295;--c3:#e6a4c8;--c4:#f0e442;--c5:#4d8fd1;--c6:#b39ddb;--c7:#bbb}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:72rem;margin:auto;padding:1.5rem clamp(1rem,3vw,2rem)}
h1{font-size:1.5rem;line-height:1.25;margin:0 0 1rem;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2.25rem 0 .75rem;border-bottom:1px solid var(--line);padding-bottom:.25rem}
h3{font-size:1rem;margin:1.25rem 0 .5rem;overflow-wrap:anywhere}
p,li{overflow-wrap:anywhere}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,25rem),1fr));gap:1rem;margin:0 0 1rem}
figure{margin:0;padding:.75rem;background:var(--panel);border:1px solid var(--line);border-radius:6px;min-width:0}
figcaption{font-weight:600;margin-bottom:.25rem;overflow-wrap:anywhere}
figure>svg{display:block;width:100%;height:auto;max-width:40rem}
svg text{font:12px system-ui,sans-serif;fill:var(--soft)}
svg path:not([fill]){fill:none}
svg path{stroke-width:1.75;stroke-linejoin:round}
svg.plot :is(path,line){stroke-width:1}figure>svg.plot{max-width:28rem}
svg .axis{stroke:var(--soft);stroke-width:1}
svg .grid{stroke:var(--line);stroke-width:1}
.key{list-style:none;display:flex;flex-wrap:wrap;gap:.15rem 1rem;margin:.4rem 0 0;padding:0;font-size:.875rem}
.key li{min-width:0}
.swatch{width:22px;height:10px;margin-right:.4rem;vertical-align:middle}
.swatch path{stroke-width:3}
.scroll{overflow-x:auto;margin:0 0 1rem}
table{border-collapse:collapse;font-size:.9rem}
th,td{text-align:left;vertical-align:top;padding:.3rem .9rem .3rem 0;border-bottom:1px solid var(--line)}
th{font-weight:600}
tbody th{font-weight:400;color:var(--soft)}
td{overflow-wrap:anywhere;min-width:9rem;font-variant-numeric:tabular-nums}
.numbers :is(td,thead th){min-width:0}.numbers td{white-space:nowrap}.numbers tbody th{min-width:9rem}
.numbers :is(td,thead th):not(:first-child){text-align:right}
pre{background:var(--panel);border:1px solid var(--line);border-radius:6px;padding:.6rem .75rem;margin:0 0 1rem;
white-space:pre-wrap;overflow-wrap:anywhere;font-size:.85rem}
.notes{border-left:4px solid var(--c1);padding:.25rem 0 .25rem 1.5rem}
summary{cursor:pointer}
footer{color:var(--soft);margin-top:2.5rem;font-size:.875rem}
"""
