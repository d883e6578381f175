import sys,json,time
sys.path.insert(0,"/tmp/e"); sys.path.insert(0,"/work/main")
import nc, itertools
from collections import Counter
from rapidfuzz.distance import Levenshtein
texts=list(dict.fromkeys(json.loads(l)["query"][1] for l in open("/work/shared/data/train/medquad.jsonl")))
W=[nc._words(t) for t in texts]; S=[w.split() for w in W]
# brute force: every pair
bylen={}
t=time.time(); near=[];sim=set();c=Counter()
nearset=set()
for i in range(len(texts)):
    for j in range(i+1,len(texts)):
        a,b=S[i],S[j]
        if abs(len(a)-len(b))<=max(1,max(len(a),len(b))//6*1):
            if Levenshtein.distance(a,b,score_cutoff=max(len(a),len(b))//6*2)<=max(len(a),len(b))//6*2:
                k=nc._compare(W[i],W[j]) if W[i]!=W[j] else "near"
                if k: c[k]+=1; (nearset if k=="near" else sim).add((i,j))
print("brute pairs",c,len({x for p in nearset for x in p}),"texts near another;",len({x for p in sim for x in p}),"texts similar to another",time.time()-t)
for i,j in sorted(nearset)[:60]: print("  ",texts[i],"|",texts[j])
# by the index: each text against an index of all others (here: by even/odd halves)
A=texts[::2];B=texts[1::2]; m=nc.NearCopies(A).find_all(B); print("odd in even by index",Counter(x.kind for x in m))
pairs=lambda s:len({j for i,j in s if i%2==0 and j%2==1}|{i for i,j in s if i%2==1 and j%2==0})
print("   by brute force: near",pairs(nearset),"similar (or near)",pairs(nearset|sim))
