import sys,json,random,time,importlib.util
spec=importlib.util.spec_from_file_location("nc", sys.argv[1]); nc=importlib.util.module_from_spec(spec); sys.modules["nc"]=nc; spec.loader.exec_module(nc)
D="/work/shared/data/"
def q(f): return [json.loads(l) for l in open(D+f)]
qs=[r["text"] for r in q("beir/scifact/queries.jsonl")]
ids={l.split("\t")[0] for l in open(D+"beir/scifact/qrels/test.tsv")}
test=[r["text"] for r in q("beir/scifact/queries.jsonl") if r["_id"] in ids]
print(len(test))
ix=nc.NearCopies(test)
for t in ["x"+test[0], test[3]+" ", test[3].upper(), "query: "+test[5], "Represent this sentence for searching relevant passages: "+test[5]]:
    print(ix.find(t), end=" ")
print()
ix2=nc.NearCopies(["请问夏天从六号码头到灯塔的渡轮每天几点开船票价是多少钱呢","What is the height of the old brick tower in town"])
for t in ["请问冬天从六号码头到灯塔的渡轮每天几点开船票价是多少钱呢","what is the height of the old brick tower in town?","height of the old brick tower in town","What is the height of the old brick tower in the town","What  is the hight of the old brick tower in town","What is the height of the new brick tower in town"]:
    print(ix2.find(t), nc.is_near_copy(t, "What is the height of the old brick tower in town"))
for name in ("gsm8k","scitldr","nl2bash","medquad","scifact_train"):
    rows=q(f"train/{name}.jsonl"); Q=[r["query"][1] for r in rows]
    t=time.process_time(); m=ix.find_all(Q); t=time.process_time()-t
    t1=time.process_time(); m1=[ix.find(x) for x in Q[:500]]; t1=time.process_time()-t1
    assert m1==m[:500]
    from collections import Counter
    print(name, Counter(x.kind for x in m), f"{t/len(Q)*1e6:.1f} us batch, {t1/500*1e6:.1f} us single", sum(map(len,Q))/len(Q))
    for a,b in zip(Q,m):
        if b.kind in("near","similar") and name!="scifact_train": print("   ",b.kind,a[:100],"|",test[b.number][:100])
import cProfile,pstats
rows=q("train/gsm8k.jsonl"); Q=[r["query"][1] for r in rows]
calls=0
orig=nc.NearCopies._find
def cnt(self,t):
    global calls; calls+=1; return orig(self,t)
nc.NearCopies._find=cnt
pr=cProfile.Profile(); pr.enable(); ix.find_all(Q); pr.disable(); print(calls,len(Q)); pstats.Stats(pr).sort_stats("tottime").print_stats(14)
print(len(ix._grams.hashes), ix._bits.nbytes, np.unpackbits(ix._bits).mean() if (np:=nc.np) else 0)
