"""The report's style sheet: one column on a phone, light and dark by the reader's setting, plain on paper."""

CSS = """
:root{--bg:#fbfaf7;--card:#fff;--ink:#1c1b1a;--soft:#66625c;--faint:#8d8881;--line:#e4dfd6;--accent:#9a4f1a;
--s1:#b3591a;--s2:#2b6c8f;--s3:#5c7d2e;--s4:#80559b;--good:#2a7444;--bad:#ab3227;--tint:#f4efe6;
--sans:ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,"Noto Sans",sans-serif;
--serif:Charter,"Bitstream Charter","Sitka Text",Cambria,Georgia,serif;
--mono:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;color-scheme:light dark}
@media (prefers-color-scheme:dark){:root{--bg:#161513;--card:#1e1c1a;--ink:#ece8e1;--soft:#a9a39a;--faint:#857f77;
--line:#34312d;--accent:#e6a470;--s1:#e89a5b;--s2:#7cb9da;--s3:#abc97a;--s4:#c9a3e0;--good:#7fc796;--bad:#ee8f84;
--tint:#25221f}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 var(--sans);font-variant-numeric:tabular-nums}
main,header,footer{max-width:66rem;margin:0 auto;padding:0 1.25rem}
header{padding-top:2.5rem}
h1,h2,h3{font-family:var(--serif);font-weight:600;line-height:1.2;text-wrap:balance}
h1{font-size:2.3rem;margin:.1rem 0 .5rem;overflow-wrap:anywhere}
h2{font-size:1.55rem;margin:3.2rem 0 .9rem;padding-top:.9rem;border-top:1px solid var(--line)}
h3{font-size:1.2rem;margin:2rem 0 .5rem}
h4{font-size:.95rem;margin:1.3rem 0 .4rem}
p{margin:.5rem 0;max-width:44rem}
a{color:var(--accent);text-underline-offset:.15em}
.kicker{font-size:.8rem;letter-spacing:.09em;text-transform:uppercase;color:var(--accent);margin:0}
.lead{font-size:1.15rem;color:var(--ink);max-width:46rem;margin:.2rem 0 1.2rem}
.soft,.note,figcaption,dt,th{color:var(--soft)}
.note{font-size:.83rem;margin:.15rem 0 0}
nav{font-size:.92rem;margin:1.4rem 0 0}
nav a{margin-right:1.1rem;text-decoration:none;white-space:nowrap}
nav a:hover{text-decoration:underline}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.9rem 1.4rem;margin:1.2rem 0 0;
padding:1rem 0;border-top:1px solid var(--line);border-bottom:1px solid var(--line)}
.facts dt{font-size:.8rem}.facts dd{margin:0;overflow-wrap:anywhere}
.state{font:600 .78rem var(--sans);padding:.12em .6em;border-radius:1em;border:1px solid currentColor;
vertical-align:.15em;white-space:nowrap}
.done{color:var(--good)}.failed,.damaged{color:var(--bad)}.interrupted,.running,.unknown{color:var(--accent)}
.better{color:var(--good)}.worse{color:var(--bad)}.same{color:var(--soft)}
.remarks{padding-left:1.1rem;max-width:46rem;margin:.6rem 0 1.2rem}.remarks li{margin:.35rem 0}
.warn{border-left:3px solid var(--accent);padding:.15rem 0 .15rem .9rem;margin:.8rem 0;max-width:46rem;
overflow-wrap:anywhere}
.warn.bad{border-color:var(--bad)}.warn p{margin:.2rem 0}
table{border-collapse:collapse;width:100%;font-size:.94rem}
th{font-weight:500;text-align:left;font-size:.82rem}
th,td{padding:.38rem .8rem .38rem 0;border-bottom:1px solid var(--line);vertical-align:top}
tr:last-child td{border-bottom:0}
td.num,th.num{text-align:right;white-space:nowrap}
.wide{overflow-x:auto}.data{max-width:40rem}.settings{max-width:48rem;table-layout:fixed;min-width:22rem}
.settings th:nth-child(2){width:38%}.settings th:nth-child(3){width:24%}
.results{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,28rem),1fr));gap:1.4rem 2.2rem}
.block{break-inside:avoid;min-width:0}
.block h3{font:600 1rem var(--sans);margin:.6rem 0 .2rem;overflow-wrap:anywhere}
.block h3 span{font-weight:400;color:var(--soft)}
.block td{vertical-align:middle;padding-top:.3rem;padding-bottom:.3rem}
.block td.num{font-weight:600}.block td .limits{display:block;font-weight:400;font-size:.8rem;color:var(--soft)}
.block td.plot{width:42%;padding-right:0}
.single{fill:var(--soft);opacity:.75}
.compare{margin-bottom:1.6rem}
.compare td{vertical-align:middle}.compare td.plot{width:30%;min-width:9rem}.compare td.num{font-weight:600}
.compare td .limits{display:block;font-weight:400;font-size:.8rem;color:var(--soft);white-space:nowrap}
.compare tr.begin td{border-top:2px solid var(--line)}.compare tr.base td:nth-child(2)::after{content:" · baseline";
color:var(--soft);font-size:.8rem}
.multiples{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,11.5rem),1fr));gap:1rem 1.1rem;
margin:.5rem 0 1.2rem}
.multiples figcaption{font-size:.82rem}.multiples figcaption .what{font-size:.86rem}
.cells td a{white-space:nowrap}.cells .soft{font-size:.82rem}
.interval{width:100%;height:20px;display:block;overflow:visible}
.changes{list-style:none;padding:0;margin:.45rem 0 0;font-size:.9rem}
.changes li{padding:.22rem 0;border-top:1px dotted var(--line)}
.changes .how{color:var(--soft);font-size:.82rem}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,19.5rem),1fr));gap:1.4rem 1.8rem;
margin:1rem 0}
figure{margin:0;break-inside:avoid;min-width:0}
figcaption{font-size:.86rem;display:flex;flex-wrap:wrap;gap:.1rem .9rem;align-items:baseline}
figcaption .what{flex-basis:100%;color:var(--ink);font-weight:600;font-size:.95rem;overflow-wrap:anywhere}
.key i{display:inline-block;width:.95em;height:.22em;border-radius:.1em;vertical-align:.22em;margin-right:.35em}
.key b{font-weight:600;color:var(--ink)}
i.s1{background:var(--s1)}i.s2{background:var(--s2)}i.s3{background:var(--s3)}i.s4{background:var(--s4)}
.chart{width:100%;height:auto;display:block}
svg text{font-family:var(--sans);font-size:11.5px;fill:var(--soft)}
.grid{stroke:var(--line);stroke-width:1}.axis{stroke:var(--faint);stroke-width:1}
.mark{stroke:var(--faint);stroke-width:1;stroke-dasharray:2 3}
.line,.raw{fill:none;stroke-linejoin:round;stroke-linecap:round}.line{stroke-width:2}.raw{stroke-width:1;opacity:.33}
.whisker{stroke-width:2.5;stroke-linecap:round}
path.s1,line.s1{stroke:var(--s1)}path.s2,line.s2{stroke:var(--s2)}path.s3,line.s3{stroke:var(--s3)}path.s4{stroke:var(--s4)}
path.band{stroke:none;opacity:.24}path.band.pale{opacity:.1}
path.band.s1{fill:var(--s1)}path.band.s2{fill:var(--s2)}
circle.s1{fill:var(--s1)}circle.s2{fill:var(--s2)}circle.s3{fill:var(--s3)}circle.s4{fill:var(--s4)}
.dot{stroke:var(--bg);stroke-width:1.5}
.sample{margin:1.1rem 0;padding:1rem 1.1rem;background:var(--card);border:1px solid var(--line);border-radius:.5rem}
.sample h4{margin:0 0 .3rem;color:var(--soft);font-weight:500;font-size:.82rem}
.said{white-space:pre-wrap;overflow-wrap:anywhere;font-size:.94rem;margin:0;max-width:none}
.prompt{font-size:1rem;margin-bottom:.6rem}
.answers{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,15rem),1fr));gap:.7rem 1.4rem;
border-top:1px solid var(--line);padding-top:.7rem;margin-top:.7rem}
.answers h4{color:var(--ink);font-weight:600}
.answers .said{max-height:15rem;overflow-y:auto}.token{color:var(--faint);font-size:.85em}
.answers .empty,.said .empty{color:var(--faint);font-style:italic}
details{margin:.8rem 0}summary{cursor:pointer;color:var(--accent)}
pre,code{font-family:var(--mono);font-size:.84rem}
pre{background:var(--tint);padding:.9rem 1rem;border-radius:.4rem;overflow-x:auto;line-height:1.45}
td code{overflow-wrap:anywhere}td:first-child code{white-space:nowrap}
.small{font-size:.9rem;border:0;padding:0;gap:.6rem 1.6rem}
footer{padding:3rem 1.25rem 3rem;color:var(--soft);font-size:.85rem}
@media (max-width:36rem){.compare .plot{display:none}body{font-size:15.5px}h1{font-size:1.85rem}header{padding-top:1.5rem}
.block td.plot{width:36%}th,td{padding-right:.55rem}.facts{grid-template-columns:1fr 1fr}}
@media print{:root{--bg:#fff;--card:#fff;--ink:#000;--soft:#444;--faint:#777;--line:#ccc;--accent:#7a3d12;--s1:#b3591a;
--s2:#2b6c8f;--s3:#5c7d2e;--s4:#80559b;--good:#1e5c34;--bad:#8f231a;--tint:#f5f5f5}
body{font-size:10.5pt}nav,summary,details:not([open]){display:none}h2{break-after:avoid}h3{break-after:avoid}
.sample,.block,figure{break-inside:avoid}.answers .said{max-height:none}
main,header,footer{max-width:none;padding-left:0;padding-right:0}
.charts,.results{grid-template-columns:1fr 1fr}@page{margin:16mm}}
"""
