import sys,json,random,resource,time,itertools
sys.path[:0]=["/tmp/e","/work/main"]
from nc import NearCopies
words=[w for l in open("/work/shared/data/train/scitldr.jsonl") for w in json.loads(l)["pos"][0].split()]
n,k=int(sys.argv[1]),int(sys.argv[2])
def texts(seed,n):
    r=random.Random(seed)
    for _ in range(n):
        i=r.randrange(len(words)-k); j=r.randrange(len(words)-k)
        yield " ".join(words[i:i+k//2]+words[j:j+k-k//2])
base=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
t=time.process_time(); ix=NearCopies(texts(1,n)); t=time.process_time()-t
import os
rss=int(open("/proc/self/statm").read().split()[1])*4096/1e6
print(n,k,f"build {t:.1f} s, peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024:.0f} MB (before {base:.0f}), now {rss:.0f} MB; grams {len(ix._grams)/1e6:.1f} M")
q=list(texts(2,3000)); t=time.process_time(); m=ix.find_all(q); t=time.process_time()-t
from collections import Counter
print("   splices of the same source (much shared):",Counter(x.kind for x in m),f"{t/3000*1e6:.0f} us each")
other=[json.loads(l)["query"][1] for l in open("/work/shared/data/train/nl2bash.jsonl")]
t=time.process_time(); m=ix.find_all(other); t=time.process_time()-t
print("   nl2bash:",Counter(x.kind for x in m),f"{t/len(other)*1e6:.1f} us each"); 
t=time.process_time(); m=[ix.find(o) for o in other[:1000]]; t=time.process_time()-t; print(f"   single {t/1000*1e6:.0f} us")
