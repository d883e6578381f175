import json,random,re,sys,time
from collections import Counter
sys.path.insert(0,"/work/main")
sys.path.insert(0,"/tmp/e"); from nc import *
D="/work/shared/data/"
def rows(f): return [json.loads(l) for l in open(D+f)]
ids={l.split("\t")[0] for l in open(D+"beir/scifact/qrels/test.tsv")}
test=[r["text"] for r in rows("beir/scifact/queries.jsonl") if r["_id"] in ids]
sets={"scifact test":test}
for n in ("medquad","nl2bash","gsm8k","scitldr"): sets[n]=list(dict.fromkeys(r["query"][1] for r in rows(f"train/{n}.jsonl")))
corpus=[r for r in rows("beir/scifact/corpus.jsonl")]
sets["scifact corpus"]=[r["text"] for r in corpus[:2000]]
zh="""请问冬天从六号码头到灯塔的渡轮每天几点开船票价是多少钱呢
研究表明长期缺乏维生素会显著增加老年人发生骨折的风险因此应当补充
如何在不重新启动服务器的情况下更新数据库的配置文件并检查是否生效
这座城市的旧桥建于十九世纪末期当时的工程师使用了当地采石场的花岗岩
我的银行卡在国外取款时被自动取款机吞掉了请问应该联系哪个部门处理
该药物在临床试验中能够降低高血压患者发生心力衰竭和中风的概率
学生们每天早上七点半在操场集合然后由老师带领他们进行半小时的锻炼
怎样才能把一个很大的文本文件按照行数平均分成若干个较小的文件""".split("\n")
ja="""冬の間に六番埠頭から灯台まで行くフェリーは毎日何時に出発しますか料金はいくらですか
長期間にわたるビタミン不足は高齢者の骨折の危険性を大きく高めることが研究で示されている
サーバーを再起動せずにデータベースの設定ファイルを更新する方法を教えてください
この町の古い橋は十九世紀の終わりに地元の採石場から運ばれた花崗岩で建てられました
海外の現金自動預払機にカードが吸い込まれてしまった場合はどこに連絡すればよいですか
この薬は臨床試験において高血圧患者の心不全と脳卒中の発生率を低下させることが確認された
生徒たちは毎朝七時半に運動場に集まり先生の指導のもとで三十分間の体操を行います
大きなテキストファイルを行数ごとに同じ大きさの小さなファイルに分割するにはどうすればよいか""".split("\n")
th="""เรือข้ามฟากจากท่าเรือหมายเลขหกไปยังประภาคารในฤดูหนาวออกเดินทางกี่โมงและราคาตั๋วเท่าไร
การขาดวิตามินเป็นเวลานานทำให้ผู้สูงอายุมีความเสี่ยงที่จะกระดูกหักเพิ่มขึ้นอย่างมาก
จะปรับปรุงแฟ้มการตั้งค่าของฐานข้อมูลโดยไม่ต้องเริ่มระบบใหม่ได้อย่างไร
สะพานเก่าแก่ของเมืองนี้สร้างขึ้นในปลายศตวรรษที่สิบเก้าด้วยหินแกรนิตจากเหมืองในท้องถิ่น
บัตรธนาคารของฉันถูกเครื่องรับจ่ายเงินอัตโนมัติยึดไว้ในต่างประเทศควรติดต่อหน่วยงานใด
ยานี้ช่วยลดอัตราการเกิดภาวะหัวใจล้มเหลวในผู้ป่วยโรคความดันโลหิตสูงในการทดลองทางคลินิก""".split("\n")
sets|={"Chinese":zh,"Japanese":ja,"Thai":th}
rng=random.Random(0)
vocab=[w for t in sets["nl2bash"] for w in t.split() if w.isalpha() and len(w)>3]
def one_in(k,how):
    def f(t):
        w=t.split(); n=len(w)
        if n<k: return None
        for block in range(0,n-k+1,k):
            i=rng.randrange(block,block+k); 
            if how=="changed": w[i]=rng.choice(vocab)
            elif how=="lost": w[i]=""
            elif how=="added": w[i]+=" "+rng.choice(vocab)
            else:
                x=w[i]; j=rng.randrange(len(x)); w[i]=x[:j]+x[j+1:] if len(x)>1 else x+"e"
        return " ".join(w)
    return f
def letter_in(k):
    def f(t):
        if len(t)<24: return None
        t=list(t)
        for b in range(0,max(1,len(t)-k+1),k):
            i=rng.randrange(b,min(len(t),b+k)); t[i]=chr(ord(t[i])+1)
        return "".join(t)
    return f
kinds={"exact":lambda t:t+" ","case":str.upper,"punctuation":lambda t:'"'+re.sub(r"[.?!,]","",t).replace(" ","  ")+'"...',
 "e5 prompt":lambda t:"query: "+t,"instruct":lambda t:"Instruct: Given a claim, retrieve documents that support or refute it\nQuery: "+t,
 "own prompt":lambda t:"Please find passages that answer this: "+t,"own prompt, no colon":lambda t:"Given a web search query retrieve relevant passages that answer the query "+t,
 "prompt+case":lambda t:"Represent this sentence for searching relevant passages: "+t.upper(),
 **{f"1 word in {k} {h}":one_in(k,h) for k in (17,12) for h in ("changed","misspelt","lost","added")},
 "1 misspelt, 40 letters":lambda t: (lambda w: None if len(t)<40 or not w else t.replace(x:=rng.choice(w), x[:2]+x[3:],1))([x for x in re.findall("[a-z]{6,}",t)]),
 "1 word in 6":one_in(6,"changed"),"letter in 28":letter_in(28),"letter in 12":letter_in(12)}
only=sys.argv[1:]
for name,texts in sets.items():
    ix=NearCopies(texts); texts=texts[:1500] if len(texts)>1500 else texts
    cjk=name in("Chinese","Japanese","Thai")
    print(name,len(texts))
    for k,f in kinds.items():
        if k.startswith("letter")!=cjk and k not in("exact","punctuation","e5 prompt","instruct","own prompt"): continue
        p=[(i,f(t)) for i,t in enumerate(texts)]; p=[(i,t) for i,t in p if t and t!=texts[i]]
        m=ix.find_all([t for _,t in p]); c=Counter(x.kind or "-" for x in m)
        print(f"   {k:24}{len(p):6} planted", dict(c), "right text", sum(x.number==i for x,(i,_) in zip(m,p)))
        if only and k in only: print([t for x,(i,t) in zip(m,p) if x.kind!="near"][:8])
