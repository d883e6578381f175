import sys,re,random,json,time
sys.path.insert(0,"/tmp/e"); sys.path.insert(0,"/work/main")
import nc
from collections import Counter
texts=list(dict.fromkeys(json.loads(l)["query"][1] for l in open("/work/shared/data/train/medquad.jsonl")))
rng=random.Random(0)
def mis(t):
    w=re.findall("[a-z]{6,}",t)
    if len(t)<40 or not w: return None
    x=rng.choice(w); return t.replace(x,x[:2]+x[3:],1)
p=[(i,mis(t)) for i,t in enumerate(texts)]; p=[(i,t) for i,t in p if t][:2000]
ix=nc.NearCopies(texts)
for mt in (300,1000,3000):
    for co in (16,64,256):
        nc.MAX_TEXTS,nc.COMPARED=mt,co
        t=time.process_time(); m=ix.find_all([t for _,t in p]); t=time.process_time()-t
        print(mt,co,Counter(x.kind for x in m),sum(x.number==i for x,(i,_) in zip(m,p)),f"{t/len(p)*1e6:.0f} us")
nc.MAX_TEXTS,nc.COMPARED=3000,256
m=ix.find_all([t for _,t in p])
for x,(i,t) in list(zip(m,p))[:400]:
    if x.kind!="near": print(x.kind,"|",t,"|",texts[i])
